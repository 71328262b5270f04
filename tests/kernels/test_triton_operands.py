"""Operands of the Triton kernels as callers pass them: one of them misaligned, or laid out in a way of its own."""

from typing import NamedTuple

import pytest
import torch
import triton_cases
from cases import RULES, laid_out
from triton_cases import DEVICE, assert_near, one_pass, surround, terms_in_one_pass

from pyfeedback.core.algorithm import Algorithm
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.kernels import backward

pytestmark = triton_cases.MARKS
uninitialized_memory_is_nan = triton_cases.uninitialized_memory_is_nan


class Layer(NamedTuple):
    """Sizes, how the layer is launched, and a rule that reads every operand; no window is a linear layer."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    window: tuple
    launches: str
    rule: str
    algorithm: Algorithm


LAYERS = {
    "2x2": Layer((3, 5, 5, 4), (6, 5, 2, 2), ((2, 1), (1, 0), (1, 2)), "joint", "everything", Algorithm.DIRECT),
    "1x1": Layer((3, 6, 4, 4), (7, 6, 1, 1), ((2, 3), (0, 0), (1, 1)), "one pass", "ia-centered", Algorithm.DIRECT),
    "linear": Layer((3, 5, 6), (7, 6), (), "unfused", "ia-centered", Algorithm.RESPONSE_GRAM),
}
OPERANDS = ("grad_output", "input", "weight", "feedback", "response")


def channels_innermost(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def operands(layer: Layer) -> dict[str, torch.Tensor]:
    """As the kernels read them, without a copy: channels innermost, at an aligned address, NaN on all sides."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=generator).to(DEVICE) for s in (layer.input, layer.weight, layer.weight))
    exact = torch.conv2d(x.double(), w.double(), None, *layer.window) if layer.window else x.double() @ w.double().t()
    dy = torch.randn(exact.shape, generator=generator).to(DEVICE)
    tensors = (dy, x, w, b, exact.float())
    return {name: surround(channels_innermost(t)) for name, t in zip(OPERANDS, tensors, strict=True)}


def assert_right(layer: Layer, tensors: dict[str, torch.Tensor]):
    """The gradients of the kernels against those composed in float32, and in float64."""
    rule = RULES[layer.rule]
    ours = backward.layer_backward(
        *tensors.values(),
        convolution=layer.window or None,
        rule=Coefficients(**rule),
        mask=(True,) * 4,
        algorithm=layer.algorithm.value,
        center=torch.ops.pyfeedback.center.default,
        fused=layer.launches != "unfused",
    )
    like = [tensors[name] for name in ("input", "weight", "weight")]
    assert [t.stride() for t in ours[:3]] == [torch.zeros_like(t).stride() for t in like]
    op = torch.ops.pyfeedback.fa_conv2d_backward if layer.window else torch.ops.pyfeedback.fa_linear_backward
    composed, exact = (
        op(*(t.to(wide).contiguous() for t in tensors.values()), *layer.window, **rule)
        for wide in (torch.float32, torch.float64)
    )
    for mine, theirs, oracle in zip(ours, composed, exact, strict=True):
        assert_near(mine, theirs, oracle)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_misaligned_operand(name, operand, monkeypatch):
    """Triton compiles another kernel where an address is no multiple of 16 bytes; only the one operand's is not."""
    launched = one_pass(monkeypatch) if LAYERS[name].launches == "one pass" else None
    tensors = operands(LAYERS[name])
    tensors[operand] = surround(tensors[operand], shift=1)
    assert [other for other, t in tensors.items() if t.data_ptr() % 16] == [operand]
    assert_right(LAYERS[name], tensors)
    assert launched is None or terms_in_one_pass(launched) == ["z"]


def sliced(t):
    """Every second element of the innermost dimension of a wider tensor, NaN between them."""
    return laid_out(t, "sliced")


def expanded(t):
    """One value, as the gradient of a sum."""
    return t.flatten()[:1].view((1,) * t.dim()).expand(t.shape)


def reversed_dimensions(t):
    """The batch, or the rows, innermost."""
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


def every_second_row(t):
    """Of a tensor of twice the batch, or of twice the rows."""
    wide = torch.full((2 * len(t), *t.shape[1:]), float("nan"), dtype=t.dtype, device=t.device)
    wide[::2] = t
    return wide[::2]


LAYOUTS = {"sliced": sliced, "reversed": reversed_dimensions, "rows": every_second_row}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", OPERANDS)
def test_an_operand_in_a_layout_of_its_own(operand, layout, monkeypatch):
    for layer in LAYERS.values():
        with monkeypatch.context() as patch:
            if layer.launches == "one pass":
                one_pass(patch)
            tensors = operands(layer)
            tensors[operand] = surround(LAYOUTS[layout](tensors[operand]))
            assert_right(layer, tensors)


def test_a_gradient_that_is_one_value_everywhere():
    for layer in LAYERS.values():
        tensors = operands(layer)
        tensors["grad_output"] = expanded(tensors["grad_output"])
        assert_right(layer, tensors)
