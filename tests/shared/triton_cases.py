"""Importing the Triton kernels for a test, on the interpreter where there is no GPU; tiny layers, and what is allowed.

The interpreter multiplies the raw bits of bfloat16, so there mostly float32 and float16 are tested; it is slow, so the
layers are tiny.
"""

import random
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need triton")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

with pytest.MonkeyPatch.context() as _patch:
    if not GPU:
        _patch.setenv("TRITON_INTERPRET", "1")  # read where the kernels are decorated
    from pyfeedback.core.algorithm import Algorithm
    from pyfeedback.core.coefficients import Coefficients
    from pyfeedback.kernels import backward, handles, plan, probe_table, signs  # noqa: F401  # for the tests of probes
    from pyfeedback.kernels.geometry import Geometry, conv_geometry
    from pyfeedback.kernels.launch import Launch, run
    from pyfeedback.kernels.tiles import PointwiseTile, Target

# Triton 3.6's interpreter makes a loop bound of an array of one element: NumPy warns before 2.4, and raises from there.
NUMPY = tuple(map(int, np.__version__.split(".")[:2]))
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
MARKS = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    *([pytest.mark.gpu] if GPU else []),
    pytest.mark.skipif(not GPU and OLD and NUMPY >= (2, 4), reason="Triton 3.6 interprets no loop with numpy 2.4"),
]

# The storage dtype, and whether means are subtracted while blocks are loaded and the second product is in units.
VARIANTS = [(torch.float32, False), (torch.float16, True), *([(torch.bfloat16, True)] if GPU else [])]
UNIT = 8.0


class Case(NamedTuple):
    """One convolution and how its positions are split."""

    input: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    splits: int = 1

    @property
    def window(self):
        return self.stride, self.padding, self.dilation

    @property
    def geometry(self) -> Geometry:
        return conv_geometry(self.input, self.weight, *self.window)


class Layer(NamedTuple):
    """Tensors of a case in PyTorch's layouts; `other` is used as the response."""

    x: torch.Tensor
    weight: torch.Tensor
    feedback: torch.Tensor
    dy: torch.Tensor
    other: torch.Tensor


def layer(case: Case, dtype=torch.float32) -> Layer:
    generator = torch.Generator().manual_seed(0)
    g = case.geometry
    out = (g.N, g.K, g.P, g.Q)
    sizes = (case.input, case.weight, case.weight, out, out)
    return Layer(*(torch.randn(s, generator=generator).to(DEVICE, dtype) for s in sizes))


MARGIN = 4096  # elements of NaN before and behind every tensor

_full = torch.full
_empty_like = torch.empty_like


def surround(t: torch.Tensor, shift: int = 0) -> torch.Tensor:
    """The same values and strides, with NaN on all sides; ``shift`` elements past an aligned address."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    storage = _full((reach + shift + 2 * MARGIN,), float("nan"), dtype=t.dtype, device=t.device)
    return storage.as_strided(t.shape, t.stride(), MARGIN + shift).copy_(t)


def inner(t: torch.Tensor) -> torch.Tensor:
    """Channels innermost, without gaps; NaN on all sides."""
    return surround(t.permute(0, 2, 3, 1).contiguous())


def fresh(t: torch.Tensor, dtype=None) -> torch.Tensor:
    """Memory to be written: a kernel that leaves an element out leaves NaN."""
    return surround(_empty_like(t, dtype=dtype).fill_(float("nan")))


def mean_and_unit(rows: int, channels: int) -> dict[str, torch.Tensor]:
    """What a kernel subtracts from x, no real mean, and a unit."""
    mean = torch.randn(rows, channels, generator=torch.Generator().manual_seed(1)) + 2
    return {"mean": surround(mean.to(DEVICE)), "unit": surround(torch.full((1,), UNIT, device=DEVICE))}


def options(case: Case, centered: bool) -> tuple[dict, torch.Tensor | float, float]:
    """Arguments mean and unit of a launch, or none; what is subtracted from x [N, C, H, W], and the unit."""
    if not centered:
        return {}, 0.0, 1.0
    _, c, h, w = case.input
    both = mean_and_unit(h * w, c)
    return both, both["mean"].view(h, w, c).permute(2, 0, 1), UNIT


def mean_of_u(case: Case, centered: bool) -> tuple[dict, torch.Tensor | float]:
    """The argument u_mean of wgrad_launch, or none; what is subtracted from u [N, K, P, Q]."""
    if not centered:
        return {}, 0.0
    g = case.geometry
    mean = mean_and_unit(g.P * g.Q, g.K)["mean"]
    return {"u_mean": mean}, mean.view(g.P, g.Q, g.K).permute(2, 0, 1)


def products(x, kernel, y, case: Case, dtype=torch.float64):
    """convT(y, kernel) and wgrad(x, y) of PyTorch."""
    y, x, kernel = (t.to(dtype) for t in (y, x, kernel))
    mask = (True, True, False)
    return torch.ops.aten.convolution_backward(y, x, kernel, None, *case.window, False, (0, 0), 1, mask)[:2]


def target(itemsize: int, capability: int, processors: int = 132) -> Target:
    """A device, and operands of that many bytes."""
    return Target("float32" if itemsize == 4 else "bfloat16", False, capability, processors)


def described(
    describe, geometry: Geometry, *args, prefix="", tile=None, processors=132, **operands
) -> tuple[Launch, dict]:
    """A launch of these tensors and numbers, by parameter, and what it names: the parameter after ``prefix``."""
    values = {prefix + name: t for name, t in operands.items() if t is not None}
    named = {name: prefix + name for name, t in operands.items() if isinstance(t, torch.Tensor)}
    named = {name: t for name, t in operands.items() if name not in named} | named
    u, mean, y = (operands.get(name) for name in ("u", "mean", "y"))
    options = {} if mean is None else {"sample": len(mean)}
    if describe.__name__ == "wgrad_launch":
        kernels = ((short, operands.get(name)) for short, name in (("w", "dw"), ("f", "f")))
        options |= {f"{short}_strides": t.stride() for short, t in kernels if t is not None}
        if u is not None:
            options["u_channels"] = u.shape[-1]
            named["u"] = prefix + ("x" if u is operands["x"] else "u")
    elif describe.__name__ == "pointwise_launch" and y is not None:
        options["used"] = len(y)
    dtype = operands.get("x", operands.get("dy")).dtype
    device = Target(str(dtype).removeprefix("torch."), processors=processors)
    return describe(geometry, device, *args, tile=tile, **options, **named), values


def run_kernel(describe, geometry: Geometry, *args, **operands) -> None:
    """The launch of these tensors and numbers, by parameter."""
    run(*described(describe, geometry, *args, **operands), torch.device(DEVICE))


@contextmanager
def bfloat16_products():
    """Within it, the interpreter rounds to the nearest bfloat16, which it truncates to, and multiplies its values."""
    if GPU:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

    def converted(data, source, to, mode):
        if (source.name, to.name) != ("fp32", "bf16"):
            return _convert_float(data, source, to, mode)
        wide = np.ascontiguousarray(data).view(np.float32)
        return torch.from_numpy(wide.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)

    def multiplied(builder, a, b, *rest):
        a, b = (
            TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), float32) if t.dtype.name == "bf16" else t
            for t in (a, b)
        )
        return dot(builder, a, b, *rest)

    dot, float32 = InterpreterBuilder.create_dot, triton.language.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triton.runtime.interpreter._convert_float", converted)
        patch.setattr(InterpreterBuilder, "create_dot", multiplied)
        yield


def record_launches(monkeypatch, **choices) -> list[Launch]:
    """What is launched from here on; ``choices`` replace functions of the plan, which is made anew each time."""
    launched = []
    start = handles.start
    monkeypatch.setattr(backward, "planned", backward.planned.__wrapped__)
    monkeypatch.setattr(backward, "plan_backward", plan.plan_backward.__wrapped__)
    monkeypatch.setattr(handles, "start", lambda launch, values: (launched.append(launch), start(launch, values))[1])
    for name, function in choices.items():
        monkeypatch.setattr(plan, name, function)
    return launched


def names(launched: list[Launch]) -> list[str]:
    """The kernels of these launches, without those that finish another."""
    found = [str(launch).partition("(")[0] for launch in launched]
    return [name for name in found if name != "finish"]


def terms_in_one_pass(launched: list[Launch]) -> list[str]:
    """The terms of the one-pass launches among these."""
    return [launch.constants["FLAGS"].TERM for launch in launched if names([launch]) == ["pointwise"]]


def one_pass(monkeypatch) -> list[Launch]:
    """Pointwise layers in one pass, with a tile that the interpreter can take, in float32 too; what is launched."""
    tile = PointwiseTile(32, 32, 16, 3, 4, 2)
    return record_launches(monkeypatch, choose_pointwise=lambda geometry, *_: tile if geometry.pointwise else None)


def layer_backward(
    case: Case, x, w, b, y, terms: dict, algorithm: Algorithm, fused=True, mask=(True,) * 4, linear=False, dy=None
):
    """The four gradients of the kernels; a linear layer's with the positions of the case as its tokens."""
    options = {"rule": Coefficients(**terms), "mask": mask, "algorithm": algorithm.value, "fused": fused}
    options["center"] = torch.ops.pyfeedback.center.default
    g = case.geometry
    dy = x.new_ones(g.N, g.K, g.P, g.Q) if dy is None else dy
    if not linear:
        return backward.layer_backward(dy, x, w, b, y, convolution=case.window, **options)
    x, y, dy = (None if t is None else t.flatten(2).transpose(1, 2).contiguous() for t in (x, y, dy))
    dx, *kernels, bias = backward.layer_backward(dy, x, w.flatten(1), b.flatten(1), y, convolution=None, **options)
    dx = None if dx is None else dx.transpose(1, 2).view(case.input)
    return dx, *(t if t is None else t.view(case.weight) for t in kernels), bias


def data_terms(case: Case, x, w, b, y, terms: dict, dtype):
    """What amp, null and sparse give, composed of PyTorch's own in ``dtype``, both factors of every product centered.

    A response that is not given is that of the centered input: it is not rounded at the size of its mean.
    """
    x, w, b = (t.to(dtype) for t in (x, w, b))
    n = terms.get("samples") or len(x)
    x = torch.ops.pyfeedback.center.default(x, n) if terms.get("center") else x[:n]
    if y is None:
        y = torch.conv2d(x, w, None, *case.window)
    else:
        y = torch.ops.pyfeedback.center.default(y.to(dtype), n) if terms.get("center") else y[:n].to(dtype)
    amp, null, sparse = (terms.get(name, 0.0) for name in ("amp", "null", "sparse"))
    total = 0.0
    if sparse:
        total = products(x, w, torch.conv2d(x, sparse * b - amp * w, None, *case.window), case, dtype)[1] / n
        amp = 0.0
    if null:
        total = total + products(null * products(x, b, y, case, dtype)[0] - amp * x, w, y, case, dtype)[1] / n
    elif amp:
        total = total - products(x, w, y, case, dtype)[1] * (amp / n)
    return total


def assert_near(ours, composed, oracle):
    """At most twice the error of PyTorch's own in the same dtype, or a few roundings of the result."""
    assert ours.isfinite().all()
    scale = oracle.abs().max()
    error, allowed = ((t.double() - oracle).abs().max() for t in (ours, composed))
    floor = 2 * torch.finfo(ours.dtype).eps * scale
    assert error <= 2 * allowed + floor, (error / scale, allowed / scale)


def fill_memory_with_nan(monkeypatch):
    """Whatever is allocated and not written shows; returns what asserts that nothing was written beside it."""
    allocated = []

    def guarded(t):
        allocated.append(surround(t.fill_(float("nan"))))
        return allocated[-1]

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: guarded(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda t, **k: guarded(_empty_like(t, **k)))

    def assert_margins():
        for t in allocated:
            storage = t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)
            assert storage[:MARGIN].isnan().all()
            assert storage[-MARGIN:].isnan().all()

    return assert_margins


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan(monkeypatch):
    """For the module that names it: memory is filled with NaN, and what a kernel writes beside its tensors is found."""
    assert_margins = fill_memory_with_nan(monkeypatch)
    yield
    assert_margins()


@contextmanager
def shuffled_programs(monkeypatch, seed: int):
    """The programs of every launch in a random order; one at least must be launched."""
    if GPU:
        pytest.skip("the order is the scheduler's")
    from triton.runtime.interpreter import interpreter_builder

    place, orders = interpreter_builder.set_grid_idx, {}

    def shuffled(x, y, z):
        size = tuple(interpreter_builder.grid_dim)
        cells = [(i, j, 0) for i in range(size[0]) for j in range(size[1])]
        order = orders.setdefault(size, random.Random(seed).sample(cells, len(cells)))
        place(*order[cells.index((x, y, z))])

    with monkeypatch.context() as patch:
        patch.setattr(interpreter_builder, "set_grid_idx", shuffled)
        yield
    assert orders
