"""What a forward computes from its weights before it multiplies them with its data.

:class:`Tracker` is a mode, active during a forward that reads weights instead of calling layers. It follows each weight
with its feedback weight:

* The feedback weight takes the same views as its weight: slices, transposes, casts, chunks and concatenations.
* A function that changes the values and keeps the shape, such as a standardization, leaves the feedback weight as it
  is: B then belongs to the computed weight, and the rule compares it with that.

:mod:`pyfeedback.nn.products` has the products, for which the tracker calls :meth:`FeedbackLayer.run`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyfeedback.core.geometry import LINEAR, Geometry
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


class Tracker(TorchFunctionMode):
    """The mode of one forward pass of one module.

    Args:
        layers: each weight that the forward may read, and the layer that it belongs to.
        constants: other tensors that do not depend on the data: parameters and buffers of the module.
    """

    products: ClassVar[dict[Any, Callable[..., Any]]] = {}  # by the function of PyTorch

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
        product = self.products.get(func)
        if product is not None:
            output = product(self, *args, **kwargs)
            if output is not None:
                return output
        result = func(*args, **kwargs)
        self.follow(func, args, kwargs, result)
        return result

    def find(self, tensor: Any) -> Known | None:
        """What is known of a tensor; None for data and for anything else."""
        if torch.compiler.is_compiling():  # the id of an input would be a guard, and so a new graph for each input
            pairs = ((key, w) for known in (self.layers, self.known) for key, (w, *_) in known.items())
            key = next((key for key, w in pairs if w is tensor), 0)
        else:
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
        outputs = [t for t in tensors_in((result,)) if t.is_floating_point()]
        tensors = [t for t in tensors_in((*args, *kwargs.values())) if t.is_floating_point()]
        known = [self.find(t) for t in tensors]
        used = [k for k in known if k is not None and k.layers]
        layers = tuple(dict.fromkeys(layer for k in used for layer in k.layers))
        if func in VIEWS and tensors:
            first = next(tensors_in((*args, *kwargs.values())))  # of any dtype: the others are not viewed
            self._follow_view(func, args, kwargs, known if func in JOINS else [self.find(first)], outputs)
        elif None not in known:
            with_feedback = [k for k in used if k.feedback is not None]
            changed = with_feedback[0] if len(with_feedback) == 1 else None
            for output in outputs:
                keeps = changed is not None and output.shape == changed.tensor.shape
                self.known[id(output)] = Known(output, layers, changed.feedback if changed and keeps else None, True)
        elif (
            func not in LOOKUPS and any(k.feedback is not None for k in used) and any(t.requires_grad for t in outputs)
        ):
            warn_of_lost(layers, getattr(func, "__name__", str(func)))

    def _follow_view(
        self, func: Any, args: tuple, kwargs: dict[str, Any], viewed: list[Known | None], outputs: list[Tensor]
    ) -> None:
        """:meth:`follow` for a view of the tensors ``viewed``, or a copy of them: that of the feedback is the same."""
        sources = [k for k in viewed if k is not None]
        if len(sources) < len(viewed):
            return
        feedback: list[Tensor | None] = [None] * len(outputs)
        if all(k.feedback is not None for k in sources):
            if func is torch.Tensor.contiguous:  # the strides of the feedback tell which dimensions were swapped
                feedback = [k.feedback for k in sources]
            else:
                by_id = {id(k.tensor): k.feedback for k in sources}
                found = tensors_in((func(*_replaced(args, by_id), **_replaced(kwargs, by_id)),))
                feedback = [t for t in found if t.is_floating_point()]
        layers = tuple(dict.fromkeys(layer for k in sources for layer in k.layers))
        is_computed = any(k.is_computed for k in sources)
        for output, of_output in zip(outputs, feedback, strict=True):
            self.known[id(output)] = Known(output, layers, of_output, is_computed)


def warn_of_lost(layers: tuple[FeedbackLayer, ...], used_by: str) -> None:
    """Warn, once per layer, if a weight is used in a way that has no feedback path."""
    if torch.compiler.is_compiling():
        return
    for layer in layers:
        if layer not in _warned:
            _warned.add(layer)
            _log.warning(
                "%s(%s): its weight is used by %s, which has no feedback path: gradients pass through W itself",
                type(layer).__name__, layer.extra_repr().removeprefix(", "), used_by,
            )  # fmt: skip


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)


def _replaced(values: Any, by_id: dict[int, Any]) -> Any:
    """The same arguments with some tensors replaced."""
    if isinstance(values, dict):
        return {key: _replaced(v, by_id) for key, v in values.items()}
    if type(values) in (tuple, list):
        return type(values)([_replaced(v, by_id) for v in values])
    return by_id.get(id(values), values)


def functions(*names: str) -> Iterator[Any]:
    """The functions of these names, in torch, torch.nn.functional and torch.Tensor."""
    for name in names:
        for place in (torch, F, torch.Tensor, torch._C._nn):
            if hasattr(place, name):
                yield getattr(place, name)


JOINS = frozenset(functions("cat", "concat", "concatenate", "stack", "hstack", "vstack"))
_VIEW_NAMES = (
    "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "view", "reshape", "flatten",
    "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "view_as", "reshape_as", "contiguous", "clone", "to",
    "type", "type_as", "float", "double", "half", "bfloat16", "cuda", "cpu", "detach", "__getitem__", "select",
    "narrow", "index_select", "chunk", "split", "tensor_split", "unbind", "unsafe_chunk", "unsafe_split",
    "split_with_sizes", "repeat", "flip", "roll",
)  # fmt: skip
VIEWS = JOINS | frozenset(
    [*functions(*_VIEW_NAMES), *(getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data"))]
)
LOOKUPS = frozenset(functions("embedding", "embedding_bag"))  # of rows, by integers
