"""The products of PyTorch, each as a call of :meth:`FeedbackLayer.run` if one of its operands is a weight.

Each function has the arguments of that of PyTorch after the tracker, and returns None if it does not apply.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfeedback.core.geometry import LINEAR, Convolution
from pyfeedback.nn import recurrent
from pyfeedback.nn.tracker import Known, Tracker, View, functions, tensors_in


def _same(weight: Tensor) -> Tensor:
    return weight


def _swapped(weight: Tensor) -> Tensor:
    """From [..., C, K] to [..., K, C]; a vector stays as it is."""
    return weight.mT if weight.dim() > 1 else weight


def _linear(tracker: Tracker, input, weight, bias=None):
    found = tracker.weight_of(weight, input)
    if found is None or weight.dim() != 2:
        return None
    return tracker.run(found, LINEAR, _same, input, bias)


def _conv(dimensions: int):
    def conv(tracker: Tracker, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        found = tracker.weight_of(weight, input)
        if found is None:
            return None
        stride, dilation = _each(stride, dimensions), _each(dilation, dimensions)
        if padding == "same":
            total = [d * (r - 1) for d, r in zip(dilation, weight.shape[2:], strict=True)]
            sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
            input, padding = F.pad(input, sides), 0
        geometry = Convolution(
            stride, _each(0 if padding == "valid" else padding, dimensions), dilation, False, (0,) * dimensions, groups
        )
        return tracker.run(found, geometry, _same, input, bias)

    return conv


def _conv_transpose(dimensions: int):
    def conv_transpose(
        tracker: Tracker, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    ):
        found = tracker.weight_of(weight, input)
        if found is None:
            return None
        stride, padding, dilation = (_each(n, dimensions) for n in (stride, padding, dilation))
        geometry = Convolution(stride, padding, dilation, True, _each(output_padding, dimensions), groups)
        return tracker.run(found, geometry, _same, input, bias)

    return conv_transpose


def _each(number, dimensions: int) -> tuple[int, ...]:
    number = tuple(number) if isinstance(number, (tuple, list, torch.Size)) else (number,)
    return number * dimensions if len(number) == 1 else number


def _matmul(tracker: Tracker, input, other=None, mat2=None, vec=None):
    other = next(t for t in (other, mat2, vec) if t is not None)
    found = tracker.weight_of(other, input)
    if found is not None:
        return _times(tracker, found, input, _swapped)
    found = tracker.weight_of(input, other)
    if found is None:
        return None
    if other.dim() == 1:
        return _times(tracker, found, other, _same)
    output = _times(tracker, found, other.mT, _same)
    return None if output is None else output.mT if found.tensor.dim() > 1 else output


def _rmatmul(tracker: Tracker, input, other):
    return _matmul(tracker, other, input)


def _times(tracker: Tracker, found: Known, x: Tensor, view: View, bias: Tensor | None = None) -> Tensor | None:
    """x w' for w = view(weight): [K], [K, C] or [E, K, C], which may broadcast as in torch.matmul."""
    dim = found.tensor.dim()
    if dim == 1:
        return tracker.run(found, LINEAR, lambda w: view(w).unsqueeze(0), x, bias).squeeze(-1)
    if dim > 3:
        if x.shape[:-2] != found.tensor.shape[:-2]:
            return None
        output = _bank(tracker, found, x.flatten(0, -3), lambda w: view(w).flatten(0, -3))
        return output.unflatten(0, x.shape[:-2])
    if dim == 2:
        return tracker.run(found, LINEAR, view, x, bias)
    experts = found.tensor.shape[0]
    if experts == 1 and x.dim() > 2:
        return tracker.run(found, LINEAR, lambda w: view(w).squeeze(0), x, bias)
    if x.dim() == 1:
        return _bank(tracker, found, x.expand(experts, 1, -1), view).squeeze(1)
    if x.dim() == 2 or x.shape[-3] != experts:
        x = x.expand(*x.shape[:-3], experts, *x.shape[-2:])
    return _bank(tracker, found, x.movedim(-3, 0), view).movedim(0, -3)


def _bank(tracker: Tracker, found: Known, x: Tensor, view: View) -> Tensor:
    """x [E, ..., C] times weights [E, K, C]: a pointwise convolution with one group for each of the E weights."""
    experts, outputs = found.tensor.shape[:-2].numel(), view(found.tensor).shape[-2]
    count, channels = (x.shape[1:-1] or (1,))[0], x.shape[-1]
    columns = x.reshape(experts, count, -1, channels) if x.numel() else x.new_zeros(experts, count, 1, channels)
    columns = columns.permute(1, 0, 3, 2).flatten(1, 2)
    geometry = Convolution((1,), (0,), (1,), False, (0,), experts)
    output = tracker.run(found, geometry, view, columns, None, lambda w: w.flatten(0, 1).unsqueeze(-1))
    output = output.unflatten(1, (experts, outputs)).permute(1, 0, 3, 2)
    return output.reshape(*x.shape[:-1], outputs)


def _addmm(tracker: Tracker, input, mat1, mat2, *, beta=1, alpha=1):
    if beta == alpha == 1 and input.dim() == 1 and mat2.dim() == 2:
        found = tracker.weight_of(mat2, mat1)
        if found is not None:
            return _times(tracker, found, mat1, torch.t, input)
    output = _matmul(tracker, mat1, mat2)
    if output is None:
        return None
    return (input if beta == 1 else beta * input) + (output if alpha == 1 else alpha * output)


def _einsum(tracker: Tracker, equation, *operands):
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if len(operands) != 2 or not isinstance(equation, str):
        return None
    labels, _, out = equation.replace(" ", "").partition("->")
    of_x, of_w = labels.split(",")
    x, w = operands
    found = tracker.weight_of(w, x)
    if found is None:
        found, x, of_x, of_w = tracker.weight_of(x, w), w, of_w, of_x
    if found is None or "->" not in equation:
        return None
    dots = "".join(chr(0x3B1 + i) for i in range(x.dim() - len(of_x.replace("...", ""))))
    of_x, out = of_x.replace("...", dots), out.replace("...", dots)
    shared = [a for a in of_w if a in of_x and a in out]
    summed = [a for a in of_w if a in of_x and a not in out]
    outputs = [a for a in of_w if a not in of_x]
    rows = [a for a in of_x if a not in of_w]
    if "." in of_w or len({*of_x}) < len(of_x) or len({*of_w}) < len(of_w) or {*outputs, *rows} - {*out} or not summed:
        return None
    sizes = dict(zip(of_x, x.shape, strict=True)) | dict(zip(of_w, found.tensor.shape, strict=True))
    if [*x.shape] != [sizes[a] for a in of_x]:  # broadcast
        return None

    def size_of(labels: Iterable[str]) -> int:
        return math.prod(sizes[a] for a in labels)

    experts = [size_of(shared)] if shared else []

    def view(weight: Tensor) -> Tensor:
        weight = weight.permute([of_w.index(a) for a in (*shared, *outputs, *summed)])
        return weight.reshape(*experts, size_of(outputs), size_of(summed))

    x = x.permute([of_x.index(a) for a in (*shared, *rows, *summed)])
    x = x.reshape(*experts, *(sizes[a] for a in rows), size_of(summed))
    output = _bank(tracker, found, x, view) if shared else tracker.run(found, LINEAR, view, x, None)
    made = (*shared, *rows, *outputs)
    return output.reshape([sizes[a] for a in made]).permute([made.index(a) for a in out])


def _grouped_mm(tracker: Tracker, mat_a, mat_b, offs=None, bias=None, out_dtype=None):
    found = tracker.weight_of(mat_b, mat_a)
    if found is None or found.feedback is None or found.tensor.dim() != 3 or offs is None or bias is not None:
        return None
    ends = offs.tolist()
    experts = [found._replace(tensor=w, feedback=b) for w, b in zip(found.tensor, found.feedback, strict=True)]
    spans = zip(experts, [0, *ends], ends, strict=False)
    parts = [tracker.run(expert, LINEAR, _swapped, mat_a[start:end], None) for expert, start, end in spans]
    return torch.cat([*parts, mat_a.new_zeros(len(mat_a) - ends[-1], mat_b.shape[-1])])


def _recurrent(run: Callable[..., Any]):
    def apply(tracker: Tracker, *args):
        weights = [t for t in tensors_in(args) if (known := tracker.find(t)) is not None and known.layers]
        return run(lambda *a, **k: _of_step(tracker, *a, **k), *args) if weights else None

    return apply


def _of_step(tracker: Tracker, input: Tensor, weight: Tensor, bias: Tensor | None, steps: int = 1) -> Tensor:
    """F.linear in one of several steps that use the same weight."""
    found = tracker.weight_of(weight)
    if found is None:
        return F.linear(input, weight, bias)
    return tracker.run(found, LINEAR, _same, input, bias, steps=steps)


PRODUCTS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(functions("linear"), _linear),
    **{f: _conv(n) for n in (1, 2, 3) for f in functions(f"conv{n}d")},
    **{f: _conv_transpose(n) for n in (1, 2, 3) for f in functions(f"conv_transpose{n}d")},
    **dict.fromkeys(functions("matmul", "mm", "bmm", "mv", "__matmul__"), _matmul),
    **dict.fromkeys(functions("__rmatmul__"), _rmatmul),
    **dict.fromkeys(functions("addmm", "addmv", "baddbmm"), _addmm),
    **dict.fromkeys(functions("einsum"), _einsum),
    **dict.fromkeys(functions("grouped_mm", "_grouped_mm"), _grouped_mm),
    **{f: _recurrent(run) for name, run in recurrent.FUNCTIONS.items() for f in functions(name)},
}


class Products(Tracker):
    """The mode in which every product with a weight goes through the feedback weight."""

    products = PRODUCTS
