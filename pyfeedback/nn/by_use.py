"""Modules that multiply weights with data in their own forward, instead of calling a layer for it.

Such a module gets a class of its own, whose forward runs under :class:`~pyfeedback.nn.products.Products`. For each of
its own weights it has a child :class:`UsedWeight`, which holds the feedback weight; layers whose weights it reads have
theirs already.
"""

import copyreg
import types
from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyfeedback.core.geometry import LINEAR, Convolution, Geometry
from pyfeedback.core.tensors import DTYPES
from pyfeedback.core.uses import reads_attribute, weights_in_products
from pyfeedback.init import Init
from pyfeedback.nn.layer import FeedbackLayer, traced_call
from pyfeedback.nn.products import Products
from pyfeedback.rules import Rule


class Layout(NamedTuple):
    """How a product uses a weight."""

    geometry: Geometry
    swapped: bool  # whether the inputs come before the outputs, as in [C, K]
    inputs: int  # C, of a linear layer


class UsedWeight(FeedbackLayer):
    """The feedback weight and the rule of one weight of a module that uses it in its own forward.

    It is the child ``{name}_feedback`` of that module, and is not called. ``feedback`` has the layout of the weight. A
    weight [E, ..., ...] of experts counts as E groups.

    Args:
        owner: the module.
        name: the name of the weight in it.
        is_computed: whether the forward changes the values of the weight before the product.
        rule, init: as in :class:`pyfeedback.nn.Linear`.

    Attributes:
        computed: the values that the last forward multiplied with its data, if they are not those of the parameter, as
            under weight standardization. They are then the ``weight`` that the rule compares with the feedback weight.
    """

    owner: nn.Module
    computed: Tensor | None
    layout: Layout | None = None  # of the last product; only if the rule reads probes

    def __init__(self, owner: nn.Module, name: str, is_computed: bool, rule: str | Rule, init: Init | None = None):
        super().__init__()
        object.__setattr__(self, "owner", owner)  # not as a submodule, which would be a cycle
        self.weight_name = name
        self.computed = getattr(owner, name).detach() if is_computed else None
        self.attach_feedback(rule, init)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that ``feedback`` belongs to: the parameter, or what the forward computed from it."""
        parameter: Tensor = getattr(self.owner, self.weight_name)
        computed = self.computed
        if computed is None or computed.device != parameter.device or computed.dtype != parameter.dtype:
            return parameter
        return computed

    def weight_owner(self) -> nn.Module:
        return self.owner

    @property
    def bias(self) -> None:
        """None: what is added to the product is not part of it."""

    def enter_by_use(self, computed: Tensor | None) -> None:
        if computed is not None and self.feedback is not None and computed.shape != self.feedback.shape:
            computed = None  # rows or views of it: not what the feedback weight can be compared with
        object.__setattr__(self, "computed", None if computed is None else computed.detach())
        super().enter_by_use(computed)

    def note_layout(self, geometry: Geometry, feedback: Tensor) -> None:
        if self.rule.reads_probes:
            swapped = feedback.stride(-1) > feedback.stride(-2)
            if isinstance(geometry, Convolution):
                swapped = geometry.transposed
            object.__setattr__(self, "layout", Layout(geometry, swapped, feedback.shape[-1]))

    def as_matrices(self, kernel: Tensor) -> Tensor:
        geometry, swapped, inputs = self.layout or Layout(LINEAR, False, kernel.shape[-1])
        if isinstance(geometry, Convolution):
            matrices = kernel.reshape(geometry.groups, kernel.shape[0] // geometry.groups, -1)
        else:
            are_experts = kernel.dim() > 2 and kernel.shape[-2 if swapped else -1] == inputs
            experts = kernel.shape[:-2].numel() if are_experts else 1
            matrices = kernel.reshape(experts, *((inputs, -1) if swapped else (-1, inputs)))
        return matrices.mT if swapped else matrices

    def from_matrices(self, matrices: Tensor) -> Tensor:
        swapped = self.layout is not None and self.layout.swapped
        return super().from_matrices(matrices.mT if swapped else matrices)

    def reset_parameters(self) -> None:
        """Draw the feedback weight again."""
        self.reset_feedback()

    def extra_repr(self) -> str:
        return f"{self.weight_name}, rule={self.rule}"


class ByUse(nn.Module):
    """A module whose forward runs under :class:`~pyfeedback.nn.products.Products`: that of :func:`by_use`, a subclass.

    Attributes:
        plain: the class that the module had before.
        reads_layers: whether the forward reads weights of its submodules as well as its own.
    """

    plain: type
    reads_layers: bool = False  # also in a new module of the class, which is not converted

    def readable_weights(self) -> Iterator[tuple[Tensor, FeedbackLayer]]:
        """Yield each weight with a feedback path that the forward may read, and the layer that it belongs to."""
        for module in self.modules() if self.reads_layers else (self,):
            if isinstance(module, ByUse):
                for child in module.children():
                    if isinstance(child, UsedWeight) and has_path(child):
                        yield getattr(module, child.weight_name), child
            elif isinstance(module, FeedbackLayer) and not isinstance(module, UsedWeight) and has_path(module):
                weight = module._parameters.get(module.weight_name)
                if weight is not None:
                    yield weight, module

    def _replicate_for_data_parallel(self):
        raise RuntimeError(
            f"{type(self).__name__} uses feedback weights in its own forward: expected DistributedDataParallel, not "
            "DataParallel"
        )

    def __reduce_ex__(self, protocol):
        reduced: tuple = super().__reduce_ex__(protocol)  # type: ignore[assignment]
        return _new, (self.plain, *reduced[1][1:]), *reduced[2:]


@torch._disable_dynamo
def run_uncompiled(module: ByUse, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run the forward of a module outside of the compiled graph: the sizes of grouped products depend on the data."""
    with Products(module.readable_weights(), (*module._parameters.values(), *module._buffers.values())):
        return forward(module, *args, **kwargs)


def has_path(layer: FeedbackLayer) -> bool:
    """Whether a layer has another error signal than that of backprop."""
    return layer.feedback is not None or layer.direct is not None


@cache
def by_use(plain: type) -> type:
    """The subclass of :class:`ByUse` and a class of modules; it has the name and the arguments of the latter."""
    called: Any = plain

    groups = reads_attribute(plain, frozenset(["grouped_mm", "_grouped_mm"]))

    @wraps(called.forward)  # programs such as the Trainer of transformers read the names of the arguments
    def forward(self, *args, **kwargs):
        if any(isinstance(a, torch.fx.Proxy) for a in (*args, *kwargs.values())):
            return traced_call(self, args, kwargs)
        if torch.compiler.is_compiling():
            config = getattr(self, "config", None)
            if groups or getattr(config, "_experts_implementation", None) == "grouped_mm":  # of transformers
                return run_uncompiled(self, called.forward, args, kwargs)
        with Products(self.readable_weights(), (*self._parameters.values(), *self._buffers.values())):
            return called.forward(self, *args, **kwargs)

    names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {**names, "plain": plain, "forward": forward}
    return types.new_class(plain.__name__, (ByUse, plain), exec_body=lambda space: space.update(own))


def _new(plain: type, *arguments):
    return copyreg.__newobj__(by_use(plain), *arguments)  # type: ignore[attr-defined]


def plain_class(module: nn.Module) -> type:
    """The class of a module, as it was before :func:`attach`."""
    return type(module).plain if isinstance(module, ByUse) else type(module)


def used_weights(module: nn.Module) -> tuple[dict[str, bool], list[str]]:
    """Names of the own weights that a module's forward multiplies with its data, and of its other matrices.

    For each of the former, the dict has whether the forward changes the values before the product. What such a change
    reads besides, as a gain for each output, is neither.
    """
    named = {n: p for n, p in module.named_parameters(recurse=False) if is_lazy(p) or p.dim() > 1}
    matrices = [name for name, p in named.items() if not is_lazy(p) and p.dtype in DTYPES]
    found = {}
    if matrices and "forward" not in vars(module):
        found = weights_in_products(plain_class(module), matrices)
    gains = {
        name for name, is_computed in found.items() if is_computed and named[name].numel() == max(named[name].shape)
    }
    return {name: found[name] for name in found if name not in gains}, [name for name in named if name not in found]


def attach(module: nn.Module, name: str, is_computed: bool, rule: Rule, init: Init) -> UsedWeight:
    """Give a module a feedback weight for its weight ``name``, and return the layer that holds it."""
    layer = UsedWeight(module, name, is_computed, rule, init)
    module.add_module(f"{name}_feedback", layer)
    _enter(module, reads_layers=False)
    return layer


def attach_readers(model: nn.Module) -> None:
    """Let every module that reads the weights of its layers read them with their feedback weights."""
    for module in list(model.modules()):
        inside = (m for m in module.modules() if isinstance(m, FeedbackLayer) and m is not module)
        names = frozenset(m.weight_name for m in inside if not (isinstance(m, UsedWeight) and m.owner is module))
        if names and reads_attribute(plain_class(module), names):
            _enter(module, reads_layers=True)


def _enter(module: nn.Module, reads_layers: bool) -> None:
    if "forward" not in vars(module) and not isinstance(module, FeedbackLayer):
        module.__class__ = by_use(plain_class(module))
        module.reads_layers = reads_layers  # type: ignore[assignment]


def detach(model: nn.Module) -> None:
    """Undo :func:`attach` and :func:`attach_readers` in a whole model."""
    for module in list(model.modules()):
        if isinstance(module, ByUse):
            for name, child in list(module.named_children()):
                if isinstance(child, UsedWeight):
                    delattr(module, name)
            vars(module).pop("reads_layers", None)
            module.__class__ = module.plain
