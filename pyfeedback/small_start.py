"""A small start: weights that a normalization follows, and their feedback weights, begin at a part of their size."""

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase  # BatchNorm, SyncBatchNorm and InstanceNorm
from torch.nn.modules.conv import _ConvNd

from pyfeedback.core.values import check_model, check_positive

NORMALIZATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@torch.no_grad()
def start_small(model: nn.Module, factor: float = 0.1) -> list[str]:
    """Multiply weight, bias and feedback weight of each layer that a normalization follows by ``factor``.

    The normalization cancels the factor, so the function of the model remains the same, except for the ``eps`` of the
    normalization. Under Kolen-Pollack, only the decay reduces W - B, which starts with the size of W and B. If it is
    small and W grows, the angle between them is small soon. The gradient of a small weight is large, so it needs a
    warm-up of the learning rate, such as 50 steps for a factor of 0.1.

    The layers are the convolutions and linear layers whose output goes to a batch, instance, group, layer or RMS norm
    and nowhere else. Call this before or after :func:`pyfeedback.convert`, which draws a feedback weight with the size
    of its weight, and before the first step. Running statistics are changed accordingly.

    Args:
        model: a model that torch.fx can trace: its control flow does not depend on data.
        factor: a number above 0.

    Returns:
        The names of the layers.

    Raises:
        ValueError: torch.fx cannot trace ``model``, or ``factor`` is invalid. The model has not been changed.
    """
    check_model(model)
    check_positive("factor", factor)
    found = _normalized(model)
    norms = {norm for followed_by in found.values() for norm in followed_by}
    for p in {p for layer in found for p in layer.parameters(recurse=False)}:
        p.mul_(factor)
    for norm in norms:
        if isinstance(norm, _NormBase) and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.mul_(factor)
            norm.running_var.mul_(factor**2)
    return [name for name, module in model.named_modules() if module in found]


class _Tracer(fx.Tracer):
    """Records calls of layers of torch.nn, and of the feedback layers, which are subclasses of them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (_ConvNd, nn.Linear)) or super().is_leaf_module(m, module_qualified_name)


def _normalized(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The normalizations that read the output of a layer, for each layer whose output nothing else reads."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever a forward pass raises that is called with symbols instead of tensors
        raise ValueError(f"model is a {type(model).__name__} that torch.fx cannot trace: {error}") from error
    modules = dict(model.named_modules())
    readers: dict[nn.Module, list[nn.Module | None]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            users = [modules[user.target] if user.op == "call_module" else None for user in node.users]
            readers.setdefault(modules[node.target], []).extend(users)
    found: dict[nn.Module, list[nn.Module]] = {
        layer: [user for user in users if isinstance(user, NORMALIZATIONS)]
        for layer, users in readers.items()
        if isinstance(layer, (_ConvNd, nn.Linear)) and isinstance(layer.weight, nn.Parameter)
    }
    found = {layer: norms for layer, norms in found.items() if norms and len(norms) == len(readers[layer])}
    elsewhere = {p for module in modules.values() if module not in found for p in module.parameters(recurse=False)}
    return {layer: norms for layer, norms in found.items() if elsewhere.isdisjoint(layer.parameters(recurse=False))}
