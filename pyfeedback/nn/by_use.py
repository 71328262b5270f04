"""Modules that multiply weights with data in their own forward, instead of calling a layer for it.

Such a module gets a class of its own, whose forward runs under :class:`~pyfeedback.nn.products.Products`. For each of
its own weights it has a child :class:`UsedWeight`, which holds the feedback weight; layers whose weights it reads have
theirs already.
"""

import copyreg
import types
from collections.abc import Iterator
from functools import cache

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyfeedback.core.geometry import LINEAR, Geometry
from pyfeedback.core.uses import reads_attribute, weights_in_products
from pyfeedback.init import Init
from pyfeedback.nn.layer import FeedbackLayer
from pyfeedback.nn.products import Products
from pyfeedback.rules import Rule


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
    layout: tuple[Geometry, bool] | None = None  # of the last product, and whether its inputs come before its outputs

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
        object.__setattr__(self, "computed", None if computed is None else computed.detach())
        super().enter_by_use(computed)

    def note_layout(self, geometry: Geometry, feedback: Tensor) -> None:
        if self.rule.reads_probes:
            is_linear = geometry is LINEAR
            swapped = feedback.stride(-1) > feedback.stride(-2) if is_linear else geometry.transposed
            object.__setattr__(self, "layout", (geometry, swapped))

    def as_matrices(self, kernel: Tensor) -> Tensor:
        geometry, swapped = self.layout or (LINEAR, False)
        if geometry is LINEAR:
            matrices = kernel.reshape(-1, *kernel.shape[-2:])
        else:
            matrices = kernel.reshape(geometry.groups, kernel.shape[0] // geometry.groups, -1)
        return matrices.mT if swapped else matrices

    def from_matrices(self, matrices: Tensor) -> Tensor:
        swapped = self.layout is not None and self.layout[1]
        return super().from_matrices(matrices.mT if swapped else matrices)

    def reset_parameters(self) -> None:
        """Draw the feedback weight again."""
        self.reset_feedback()

    def extra_repr(self) -> str:
        return f"{self.weight_name}, rule={self.rule}"


class ByUse(nn.Module):
    """A module whose forward runs under :class:`~pyfeedback.nn.products.Products`; the other base class is its own.

    Attributes:
        plain: the class that the module had before.
        reads_layers: whether the forward reads weights of its submodules as well as its own.
    """

    plain: type
    reads_layers: bool

    def forward(self, *args, **kwargs):
        """Call the forward of the other class."""
        with Products(self.readable_weights(), (*self._parameters.values(), *self._buffers.values())):
            return super().forward(*args, **kwargs)

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

    def __reduce_ex__(self, protocol):
        _, (cls, *arguments), *others = super().__reduce_ex__(protocol)
        return _new, (cls.plain, *arguments), *others


def has_path(layer: FeedbackLayer) -> bool:
    """Whether a layer has another error signal than that of backprop."""
    return layer.feedback is not None or layer.direct is not None


@cache
def by_use(plain: type) -> type:
    """The subclass of :class:`ByUse` for a class of modules; it has the same name."""
    names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return types.new_class(plain.__name__, (ByUse, plain), exec_body=lambda space: space.update(names, plain=plain))


def _new(plain: type, *arguments):
    return copyreg.__newobj__(by_use(plain), *arguments)  # type: ignore[attr-defined]


def plain_class(module: nn.Module) -> type:
    """The class of a module, as it was before :func:`attach`."""
    return type(module).plain if isinstance(module, ByUse) else type(module)


def weights_of(module: nn.Module) -> list[str]:
    """Names of the parameters of a module itself that may be weights of products."""
    named = module.named_parameters(recurse=False)
    return [name for name, p in named if is_lazy(p) or (p.dim() > 1 and p.is_floating_point())]


def used_weights(module: nn.Module) -> dict[str, bool]:
    """Names of the own weights that a module's forward multiplies with its data, and whether it changes them before."""
    matrices = {n: p for n, p in module.named_parameters(recurse=False) if not is_lazy(p) and p.dim() > 1}
    if not matrices or "forward" in vars(module):
        return {}
    found = weights_in_products(plain_class(module), list(matrices))
    scales = {name for name, p in matrices.items() if p.numel() == max(p.shape)}  # of a weight, such as a gain
    return {name: is_computed for name, is_computed in found.items() if not (is_computed and name in scales)}


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
            del module.reads_layers
            module.__class__ = module.plain
