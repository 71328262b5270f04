"""The weight gradient of convolutions as a matrix product: its values, and that the tuner's choice is used."""

import copy

import pytest
import torch
from cases import RULES, laid_out
from torch import nn

import pyfeedback
from pyfeedback import tuning
from pyfeedback.backends import choices, dispatch
from pyfeedback.backends.choices import Choice, signature_of
from pyfeedback.backends.composite import im2col
from pyfeedback.backends.composite.im2col import Im2col
from pyfeedback.core.algorithm import Algorithm
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import LINEAR, Convolution

CPU = torch.device("cpu")
SHAPES = {  # the geometry, the shape of x and that of the kernel
    "3x3": (Convolution(padding=(1, 1)), (3, 8, 9, 7), (12, 8, 3, 3)),
    "3x3 strided": (Convolution((2, 2), (1, 1)), (4, 16, 14, 14), (8, 16, 3, 3)),
    "uneven": (Convolution((2, 1), (1, 0), (1, 2)), (3, 5, 11, 6), (4, 5, 3, 2)),
    "stem": (Convolution((2, 2), (3, 3)), (2, 3, 20, 17), (6, 3, 7, 7)),
    "wide padding": (Convolution((3, 2), (4, 4)), (2, 4, 5, 5), (3, 4, 5, 5)),
    "padded pointwise": (Convolution(padding=(1, 1)), (2, 3, 4, 4), (5, 3, 1, 1)),
    "one channel": (Convolution(padding=(1, 1)), (1, 1, 4, 4), (1, 1, 3, 3)),
    "one window": (Convolution(), (6, 7, 3, 3), (2, 7, 3, 3)),
}
LAYOUTS = ("contiguous", "channels_last", "sliced")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder for what is measured."""
    monkeypatch.setenv("PYFEEDBACK_CACHE", str(tmp_path))
    monkeypatch.delenv("PYFEEDBACK_TUNE", raising=False)
    choices.forget()
    yield tmp_path
    choices.forget()


def operands(name, layout, seed=0):
    """The geometry, x, y and a kernel."""
    geometry, x, kernel = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(shape, generator=generator) for shape in (x, geometry.output_shape(x, kernel), kernel))
    return geometry, *(laid_out(t, layout) for t in drawn)


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("elements", [2**20, 500, 1], ids=["whole", "parts", "rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_product_is_the_weight_gradient(name, layout, elements, monkeypatch):
    monkeypatch.setattr(im2col, "ELEMENTS", elements)
    geometry, x, y, kernel = operands(name, layout)
    x, y, kernel = x.double(), y.double(), kernel.double()
    found, expected = Im2col(*geometry).wgrad(x, y, kernel), geometry.wgrad(x, y, kernel)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for mask in ((True, True, True), (False, True, False), (True, False, True), (False, False, False)):
        pairs = zip(*(each.backward(y, x, kernel, mask) for each in (Im2col(*geometry), geometry)), strict=True)
        for needed, (found, expected) in zip(mask, pairs, strict=True):
            assert (found is not None) == (expected is not None) == needed
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_as_exact_as_pytorchs(name):
    errors = [], []
    for seed in range(40):
        geometry, x, y, kernel = operands(name, "channels_last", seed)
        exact = geometry.wgrad(x.double(), y.double(), kernel.double())
        for found, each in zip(errors, (Im2col(*geometry), geometry), strict=True):
            found.append(relative_error(each.wgrad(x, y, kernel), exact))
    ours, theirs = (torch.tensor(found).quantile(0.95).item() for found in errors)
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps


def test_an_empty_batch_has_no_gradient():
    geometry = Convolution(padding=(1, 1))
    found = Im2col(*geometry).wgrad(torch.randn(0, 3, 5, 5), torch.randn(0, 4, 5, 5), torch.randn(4, 3, 3, 3))
    assert torch.equal(found, torch.zeros(4, 3, 3, 3))


def test_it_is_bitwise_repeatable(monkeypatch):
    monkeypatch.setattr(im2col, "ELEMENTS", 20_000)
    geometry, x, y, kernel = Convolution(padding=(1, 1)), *(torch.randn(s) for s in ((8, 16, 14, 14),) * 2), None
    kernel = torch.empty(16, 16, 3, 3)
    first = Im2col(*geometry).wgrad(x, y, kernel)
    assert all(torch.equal(first, Im2col(*geometry).wgrad(x.clone(), y.clone(), kernel)) for _ in range(5))


def test_memory_is_bounded_by_parts(monkeypatch):
    largest = 0
    new_empty = torch.Tensor.new_empty

    def recorded(self, *size):
        nonlocal largest
        found = new_empty(self, *size)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr(torch.Tensor, "new_empty", recorded)
    for images, size in ((1, 64), (64, 8), (300, 8)):
        x = torch.randn(images, 16, size, size)
        Im2col(*Convolution(padding=(1, 1))).wgrad(x, x, torch.empty(16, 16, 3, 3))
        assert 0 < largest <= im2col.ELEMENTS


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["3x3", "uneven", "stem"])
def test_it_is_a_correct_candidate_of_every_rule(name, rule):
    geometry, x, _, kernel = operands(name, "channels_last")
    rule = Coefficients(**RULES[rule])
    found = tuning.candidates(signature_of(geometry, x, kernel, rule, (True,) * 4, True), CPU)
    assert "im2col" in {each.choice.backend for each in found[1:]}  # the first is used where nothing was measured
    assert all(each.refused is None for each in found), found


@pytest.mark.parametrize(
    ("geometry", "x", "kernel", "dtype"),
    [
        (Convolution(padding=(1, 1)), (2, 4, 5, 5), (3, 4, 3, 3), torch.bfloat16),
        (Convolution(padding=(1, 1), groups=2), (2, 4, 5, 5), (4, 2, 3, 3), torch.float32),
        (Convolution(), (2, 4, 5, 5), (3, 4, 1, 1), torch.float32),
        (Convolution(transposed=True), (2, 4, 5, 5), (4, 3, 3, 3), torch.float32),
        (Convolution((1,), (1,), (1,), False, (0,)), (2, 4, 5), (3, 4, 3), torch.float32),
        (LINEAR, (2, 4), (3, 4), torch.float32),
    ],
    ids=["bfloat16", "grouped", "pointwise", "transposed", "one dimension", "linear"],
)
def test_it_is_no_candidate_of_other_layers(geometry, x, kernel, dtype):
    x, kernel = torch.randn(x).to(dtype), torch.randn(kernel).to(dtype)
    calls = dispatch.layer_calls(geometry, x, kernel, Coefficients(amp=0.5), (True,) * 4, True)
    assert all(choice.backend != "im2col" for choice in calls)


@pytest.mark.parametrize("rule", ["fa", "kp", "ia"])
def test_a_choice_is_used_eager_and_compiled(rule, folder, monkeypatch):
    torch._dynamo.reset()  # the same graph of another test would be used again
    wgrad, used = Im2col.wgrad, []
    monkeypatch.setattr(Im2col, "wgrad", lambda *args: used.append(args[0]) or wgrad(*args))
    torch.manual_seed(0)
    model = pyfeedback.convert(nn.Conv2d(8, 8, 3, padding=1, bias=False), rule).to(memory_format=torch.channels_last)
    x = torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    with choices.recorded(CPU) as signatures:
        model(x).sum().backward()
    algorithm = Algorithm.DIRECT if rule == "ia" else Algorithm.NONE
    choices.write(CPU, {str(each): Choice("im2col", algorithm) for each in signatures})
    gradients = []
    for each in (model, torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)):
        x.grad = None
        each.zero_grad()
        each(x).square().sum().backward()
        products = 2 if rule == "ia" else 1
        assert len(used) == products
        used.clear()
        gradients.append([x.grad, *(p.grad for p in each.parameters())])
    for eager, compiled in zip(*gradients, strict=True):
        assert (eager is None and compiled is None) or torch.equal(eager, compiled)
