"""The products of a forward that reads weights instead of calling layers: each goes through the feedback of its weight.

:class:`Products` is a mode, active during such a forward. It replaces the products of PyTorch that have a weight as an
operand by :meth:`FeedbackLayer.run`, and it follows what the forward computes from the weight before the product:

* The feedback weight takes the same views as its weight: slices, transposes, casts, chunks and concatenations.
* A function that changes the values and keeps the shape, such as a standardization, leaves the feedback weight as it
  is: B then belongs to the computed weight, and the rule compares it with that.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyfeedback.core.geometry import LINEAR, Convolution, Geometry
from pyfeedback.nn import recurrent
from pyfeedback.nn.layer import FeedbackLayer

_log = logging.getLogger("pyfeedback")
_warned: WeakSet[FeedbackLayer] = WeakSet()

View = Callable[[Tensor], Tensor]


class Known(NamedTuple):
    """A tensor that depends on parameters only.

    Attributes:
        tensor: the tensor itself, so that its id remains its own.
        layers: those whose weights it has been made of; empty for other parameters.
        feedback: the feedback weight in the same layout, or None if the tensor no longer has that of a weight.
        is_computed: whether its values are not those of the weight.
    """

    tensor: Tensor
    layers: tuple[FeedbackLayer, ...] = ()
    feedback: Tensor | None = None
    is_computed: bool = False


class Products(TorchFunctionMode):
    """The mode of one forward pass of one module.

    Args:
        layers: each weight that the forward may read, and the layer that it belongs to.
        constants: other tensors that do not depend on the data: parameters and buffers of the module.
    """

    def __init__(self, layers: Iterable[tuple[Tensor, FeedbackLayer]], constants: Iterable[Tensor | None] = ()):
        super().__init__()
        self.layers: dict[int, tuple[Tensor, FeedbackLayer]] = {}
        for weight, layer in layers:
            self.layers.setdefault(id(weight), (weight, layer))
        self.known: dict[int, Known] = {id(t): Known(t) for t in constants if t is not None}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.__iter__:
            return iter(self.__torch_function__(torch.unbind, types, args))
        product = PRODUCTS.get(func)
        if product is not None:
            output = product(self, *args, **kwargs)
            if output is not None:
                return output
        result = func(*args, **kwargs)
        self.follow(func, args, kwargs, result)
        return result

    def find(self, tensor: Any) -> Known | None:
        """What is known of a tensor; None for data and for anything else."""
        key = id(tensor)
        if key in self.layers:  # the feedback may be computed, so it is not before it is needed
            weight, layer = self.layers.pop(key)
            self.known[key] = Known(weight, (layer,), weight if layer.direct else layer.effective_feedback())
        return self.known.get(key)

    def weight_of(self, tensor: Any, *others: Any) -> Known | None:
        """What is known of the weight of a product; None if it is not a weight, or if another operand is one too."""
        found = self.find(tensor)
        if found is None or not found.layers:
            return None
        for other in others:
            known = self.find(other)
            if known is not None and known.layers:
                return None
        if found.feedback is None or len({layer.rule for layer in found.layers}) > 1:
            warn_of_lost(found.layers, "a product, after a computation that changes its shape")
            return None
        return found

    def run(
        self,
        found: Known,
        geometry: Geometry,
        view: View,
        input: Tensor,
        bias: Tensor | None,
        pack: View | None = None,
        steps: int = 1,
    ) -> Tensor:
        """The output of a layer with the weight ``view(found.tensor)``, [..., K, C] or that of a convolution.

        Args:
            pack: from [E, K, C] to the weight of a convolution with E groups.
        """
        assert found.feedback is not None
        weight, feedback, layer = view(found.tensor), view(found.feedback), found.layers[0]
        for each in found.layers:
            each.enter_by_use(found.tensor if found.is_computed else None)
            each.note_layout(LINEAR if pack else geometry, feedback)
        if pack is not None:
            weight, feedback = pack(weight), pack(feedback)
        if layer.direct is not None:
            return geometry.fprop(layer.direct.detach(input), weight, bias)
        if found.is_computed and layer.rule.signs != "free":
            feedback = torch.copysign(feedback, weight.detach())
        return layer.run(geometry, input, weight, feedback, bias, steps)

    def follow(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Find out what is known of the result of a function that is not a product."""
        tensors = [t for t in _tensors((*args, *kwargs.values())) if t.is_floating_point()]
        known = [self.find(t) for t in tensors]
        if known.count(None) == len(known):
            return
        made = [k for k in known if k is not None and k.layers]
        outputs = [t for t in _tensors((result,)) if t.is_floating_point()]
        depends_on_data = any(k is None and t.requires_grad for t, k in zip(tensors, known, strict=True))
        if not made:
            if not depends_on_data:
                self._learn(outputs, Known)
            return
        layers = tuple({layer: None for k in made for layer in k.layers})
        if func in VIEWS:
            first = next(iter(_tensors(args or tuple(kwargs.values()))))
            whole = made if func in JOINS else [k for k in made if k.tensor is first]
            if func in JOINS and (len(made) < len(known) or any(k.feedback is None for k in made)):
                self._learn(outputs, lambda t: Known(t, layers))
            elif whole and whole[0].feedback is not None:
                replaced = {id(k.tensor): k.feedback for k in whole}
                feedback = whole[0].feedback  # as it is, so that its strides tell which dimensions were swapped
                if func is not torch.Tensor.contiguous:
                    feedback = func(*_replaced(args, replaced), **kwargs)
                of_each = {id(t): b for t, b in zip(outputs, _tensors((feedback,)), strict=True)}
                computed = any(k.is_computed for k in whole)
                self._learn(outputs, lambda t: Known(t, layers, of_each[id(t)], computed))
            elif whole:
                self._learn(outputs, lambda t: Known(t, layers))
        elif not depends_on_data:
            whole = [k for k in made if k.feedback is not None]
            shape = whole[0].tensor.shape if len(whole) == 1 else None
            feedback = whole[0].feedback if len(whole) == 1 else None
            self._learn(outputs, lambda t: Known(t, layers, feedback if t.shape == shape else None, True))
        elif (
            func not in LOOKUPS and any(t.requires_grad for t in outputs) and any(k.feedback is not None for k in made)
        ):
            warn_of_lost(layers, getattr(func, "__name__", str(func)))

    def _learn(self, outputs: list[Tensor], known_of: Callable[[Tensor], Known]) -> None:
        for output in outputs:
            self.known[id(output)] = known_of(output)


def warn_of_lost(layers: tuple[FeedbackLayer, ...], used_by: str) -> None:
    """Warn, once per layer, if a weight is used in a way that has no feedback path."""
    if torch.compiler.is_compiling():
        return
    for layer in layers:
        if layer not in _warned:
            _warned.add(layer)
            _log.warning(
                "%s(%s): its weight is used by %s, which has no feedback path: there, gradients pass through the weight "
                "itself", type(layer).__name__, layer.extra_repr().removeprefix(", "), used_by,
            )  # fmt: skip


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _replaced(values: Any, by_id: dict[int, Any]) -> Any:
    """The same arguments with some tensors replaced."""
    if isinstance(values, (tuple, list)):
        return type(values)([_replaced(v, by_id) for v in values])
    return by_id.get(id(values), values)


# Products. Each function has the arguments of that of PyTorch, and returns None if none of them is a weight.


def _same(weight: Tensor) -> Tensor:
    return weight


def _linear(products: Products, input, weight, bias=None):
    found = products.weight_of(weight, input)
    if found is None or weight.dim() != 2:
        return None
    return products.run(found, LINEAR, _same, input, bias)


def _conv(dimensions: int):
    def conv(products: Products, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        found = products.weight_of(weight, input)
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
        return products.run(found, geometry, _same, input, bias)

    return conv


def _conv_transpose(dimensions: int):
    def conv_transpose(
        products: Products, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    ):
        found = products.weight_of(weight, input)
        if found is None:
            return None
        numbers = [_each(n, dimensions) for n in (stride, padding, dilation, output_padding)]
        geometry = Convolution(*numbers[:3], True, numbers[3], groups)
        return products.run(found, geometry, _same, input, bias)

    return conv_transpose


def _each(number, dimensions: int) -> tuple[int, ...]:
    number = tuple(number) if isinstance(number, (tuple, list, torch.Size)) else (number,)
    return number * dimensions if len(number) == 1 else number


def _matmul(products: Products, input, other=None, mat2=None, vec=None):
    other = next(t for t in (other, mat2, vec) if t is not None)
    found = products.weight_of(other, input)
    if found is not None:
        return _times(products, found, input, lambda w: w.mT if w.dim() > 1 else w)
    found = products.weight_of(input, other)
    if found is None:
        return None
    if other.dim() == 1:
        return _times(products, found, other, _same)
    output = _times(products, found, other.mT, _same)
    return None if output is None else output.mT if found.tensor.dim() > 1 else output


def _rmatmul(products: Products, input, other):
    return _matmul(products, other, input)


def _times(products: Products, found: Known, x: Tensor, view: View, bias: Tensor | None = None) -> Tensor | None:
    """x w' for w = view(weight): [K], [K, C] or [E, K, C], which may broadcast as in torch.matmul."""
    dim = found.tensor.dim()
    if dim == 1:
        return products.run(found, LINEAR, lambda w: view(w).unsqueeze(0), x, bias).squeeze(-1)
    if dim > 3:
        if x.shape[:-2] != found.tensor.shape[:-2]:
            return None
        output = _bank(products, found, x.flatten(0, -3), lambda w: view(w).flatten(0, -3))
        return output.unflatten(0, x.shape[:-2])
    if dim == 2:
        return products.run(found, LINEAR, view, x, bias)
    experts = found.tensor.shape[0]
    if experts == 1 and x.dim() > 2:
        return products.run(found, LINEAR, lambda w: view(w).squeeze(0), x, bias)
    if x.dim() == 1:
        return _bank(products, found, x.expand(experts, 1, -1), view).squeeze(1)
    if x.dim() == 2 or x.shape[-3] != experts:
        x = x.expand(*x.shape[:-3], experts, *x.shape[-2:])
    return _bank(products, found, x.movedim(-3, 0), view).movedim(0, -3)


def _bank(products: Products, found: Known, x: Tensor, view: View) -> Tensor:
    """x [E, ..., C] times weights [E, K, C]: a pointwise convolution with one group for each of the E weights."""
    experts, outputs = found.tensor.shape[:-2].numel(), view(found.tensor).shape[-2]
    (count, *inner), channels = x.shape[1:-1] or (1,), x.shape[-1]
    columns = x.reshape(experts, count, -1, channels) if x.numel() else x.new_zeros(experts, count, 1, channels)
    columns = columns.permute(1, 0, 3, 2).flatten(1, 2)
    geometry = Convolution((1,), (0,), (1,), False, (0,), experts)
    output = products.run(found, geometry, view, columns, None, lambda w: w.flatten(0, 1).unsqueeze(-1))
    output = output.unflatten(1, (experts, outputs)).permute(1, 0, 3, 2)
    return output.reshape(*x.shape[:-1], outputs)


def _addmm(products: Products, input, mat1, mat2, *, beta=1, alpha=1):
    if beta == alpha == 1 and input.dim() == 1 and mat2.dim() == 2:
        found = products.weight_of(mat2, mat1)
        if found is not None:
            return _times(products, found, mat1, torch.t, input)
    output = _matmul(products, mat1, mat2)
    if output is None:
        return None
    return (input if beta == 1 else beta * input) + (output if alpha == 1 else alpha * output)


def _einsum(products: Products, equation, *operands):
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if len(operands) != 2 or not isinstance(equation, str):
        return None
    labels, _, out = equation.replace(" ", "").partition("->")
    of_x, of_w = labels.split(",")
    x, w = operands
    found = products.weight_of(w, x)
    if found is None:
        found, x, of_x, of_w = products.weight_of(x, w), w, of_w, of_x
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

    def view(weight: Tensor) -> Tensor:
        weight = weight.permute([of_w.index(a) for a in (*shared, *outputs, *summed)])
        return weight.reshape(*([-1] if shared else []), _size(sizes, outputs), _size(sizes, summed))

    x = x.permute([of_x.index(a) for a in (*shared, *rows, *summed)])
    x = x.reshape(*([_size(sizes, shared)] if shared else []), *(sizes[a] for a in rows), _size(sizes, summed))
    if shared:
        output = _bank(products, found._replace(tensor=found.tensor), x, view)
    else:
        output = products.run(found, LINEAR, view, x, None)
    made = (*shared, *rows, *outputs)
    return output.reshape([sizes[a] for a in made]).permute([made.index(a) for a in out])


def _size(sizes: dict[str, int], labels: Iterable[str]) -> int:
    size = 1
    for label in labels:
        size *= sizes[label]
    return size


def _grouped_mm(products: Products, mat_a, mat_b, offs=None, bias=None, out_dtype=None):
    found = products.weight_of(mat_b, mat_a)
    if found is None or found.tensor.dim() != 3 or offs is None or bias is not None:
        return None
    ends = offs.tolist()
    parts = [
        products.run(found, LINEAR, lambda w, i=i: w[i].mT, mat_a[start:end], None)
        for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    return torch.cat([*parts, mat_a.new_zeros(len(mat_a) - ends[-1], mat_b.shape[-1])])


def _recurrent(run: Callable[..., Any]):
    def apply(products: Products, *args):
        weights = [t for t in _tensors(args) if (known := products.find(t)) is not None and known.layers]
        return run(lambda *a, **k: _of_step(products, *a, **k), *args) if weights else None

    return apply


def _of_step(products: Products, input: Tensor, weight: Tensor, bias: Tensor | None, steps: int = 1) -> Tensor:
    """F.linear in one of several steps that use the same weight."""
    found = products.weight_of(weight)
    return (
        F.linear(input, weight, bias) if found is None else products.run(found, LINEAR, _same, input, bias, steps=steps)
    )


def _functions(*names: str) -> Iterator[Any]:
    """The functions of these names, in torch, torch.nn.functional and torch.Tensor."""
    for name in names:
        for place in (torch, F, torch.Tensor, torch._C._nn):
            if hasattr(place, name):
                yield getattr(place, name)


PRODUCTS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_functions("linear"), _linear),
    **{f: _conv(n) for n in (1, 2, 3) for f in _functions(f"conv{n}d")},
    **{f: _conv_transpose(n) for n in (1, 2, 3) for f in _functions(f"conv_transpose{n}d")},
    **dict.fromkeys(_functions("matmul", "mm", "bmm", "mv", "__matmul__"), _matmul),
    **dict.fromkeys(_functions("__rmatmul__"), _rmatmul),
    **dict.fromkeys(_functions("addmm", "addmv", "baddbmm"), _addmm),
    **dict.fromkeys(_functions("einsum"), _einsum),
    **dict.fromkeys(_functions("grouped_mm", "_grouped_mm"), _grouped_mm),
    **{f: _recurrent(run) for name, run in recurrent.FUNCTIONS.items() for f in _functions(name)},
}
JOINS = frozenset(_functions("cat", "concat", "concatenate", "stack", "hstack", "vstack"))
_VIEW_NAMES = (
    "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "view", "reshape", "flatten",
    "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "view_as", "reshape_as", "contiguous", "clone", "to",
    "type", "type_as", "float", "double", "half", "bfloat16", "cuda", "cpu", "detach", "__getitem__", "select",
    "narrow", "index_select", "chunk", "split", "tensor_split", "unbind", "unsafe_chunk", "unsafe_split",
    "split_with_sizes", "repeat", "flip", "roll",
)  # fmt: skip
VIEWS = JOINS | frozenset(
    [*_functions(*_VIEW_NAMES), *(getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data"))]
)
LOOKUPS = frozenset(_functions("embedding", "embedding_bag"))  # of rows, by integers
