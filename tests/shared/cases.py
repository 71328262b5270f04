"""Random layers for the tests of the ops: awkward sizes and every option, reproducible by number."""

import random
from typing import NamedTuple

import torch
from torch import Tensor

RULES = {
    "fa": {},
    "wm": {"amp": 0.7, "decay": 0.2},
    "wm-centered": {"amp": 0.7, "decay": 0.2, "center": True},
    "ia": {"amp": 0.6, "null": 0.4, "decay": 0.2},
    "ia-centered": {"amp": 0.3, "null": 0.5, "decay": 0.2, "center": True},
    "oja": {"amp": 0.5, "null": 0.5},
    "sa": {"self_": 0.5, "decay": 0.5},
    "aa": {"amp": 0.5, "sparse": 0.5},
    "aa-centered": {"amp": 0.5, "sparse": 0.8, "center": True},
    "kp": {"tie": 1.0, "decay": 0.3},
    "null": {"null": 0.5},
    "sparse": {"sparse": 0.5},
    "everything": {"decay": 0.3, "amp": 0.4, "null": 0.5, "sparse": 0.6, "self_": 0.2, "tie": 0.7, "center": True},
}


class Conv(NamedTuple):
    """One random convolution: the arguments of the op and the memory layout of the tensors."""

    input: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    bias: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    layout: str

    @property
    def window(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups


LAYOUTS = ("contiguous", "channels_last", "sliced", "mixed")


def random_conv(number: int) -> Conv:
    """The convolution with this number. About a third are pointwise and a fifth depthwise."""
    draw = random.Random(number)
    while True:
        groups = draw.choice((1, 1, 1, 2, 3))
        multiplier, c = draw.choice((1, 1, 2, 3)), groups * draw.choice((1, 2, 3, 5, 8))
        if number % 5 == 0:
            groups, k = c, c * multiplier
        else:
            k = groups * draw.choice((1, 2, 4, 7))
        kernel = (1, 1) if number % 3 == 0 else (draw.choice((1, 2, 3, 5)), draw.choice((1, 3, 4)))
        stride, dilation = ((draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2, 3))) for _ in range(2))
        padding = (0, 0) if number % 6 == 0 else (draw.randrange(3), draw.randrange(3))
        size = (draw.choice((1, 2, 3, 4)), c, draw.randrange(1, 12), draw.randrange(1, 12))
        reach = [d * (r - 1) + 1 for d, r in zip(dilation, kernel, strict=True)]
        if all(s + 2 * p >= r for s, p, r in zip(size[2:], padding, reach, strict=True)):
            weight = (k, c // groups, *kernel)
            return Conv(size, weight, draw.random() < 0.5, stride, padding, dilation, groups, LAYOUTS[number % 4])


def conv_tensors(case: Conv, number: int, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """Input, weight, feedback and bias of the case, drawn with the seed ``number``: leaves that require gradients."""
    torch.manual_seed(number)
    tensors = [laid_out(torch.randn(s), case.layout, i) for i, s in enumerate((case.input, case.weight, case.weight))]
    bias = torch.randn(case.weight[0]) if case.bias else None
    return [t if t is None else t.to(dtype).requires_grad_() for t in (*tensors, bias)]


def laid_out(x: Tensor, layout: str, position: int = 0) -> Tensor:
    """The same values in a memory layout. "mixed" is channels_last for the first tensor, contiguous for the others."""
    if layout == "channels_last" or (layout == "mixed" and position == 0):
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x


def fresh(tensors: list[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Copies of the leaves without gradients, in ``dtype`` if given. Dense strides are preserved."""
    return [t if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]


def gradients(tensors: list[Tensor | None]) -> list[Tensor]:
    """The gradients after a backward pass; zeros for a tensor without one."""
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors if t is not None]


def largest_error(values: list[Tensor], oracle: list[Tensor]) -> float:
    """The largest |value - oracle| over the tensors, each relative to max |oracle|; infinite if there is a nan."""
    errors = [
        ((v.double() - o.double()).abs().nan_to_num(nan=torch.inf).max() / o.abs().max().clamp_min(1e-30)).item()
        for v, o in zip(values, oracle, strict=True)
        if o.numel()
    ]
    return max(errors, default=0.0)


def norm_error(value: Tensor, oracle: Tensor) -> float:
    """|value - oracle| / |oracle|, Frobenius norms in float64."""
    return ((value.double() - oracle.double()).norm() / oracle.double().norm().clamp_min(1e-300)).item()


def percentile(values: list[float], percent: float) -> float:
    """The percentile of a sample; infinite if it contains a nan."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return float("inf") if numbers.isnan().any() else numbers.quantile(percent / 100).item()
