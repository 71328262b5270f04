"""A layer's last call, repeated without its checks and decisions for tensors that differ from its own only in values.

On a tiny layer, checks and decisions take longer than the products. All of them depend on what PyTorch's TensorGuards
compares in half a microsecond (types, shapes, strides, dtypes, devices, requires_grad, and the modes of the dispatcher:
autocast, torch.func, inference) and on the few facts of :meth:`Recalled.repeat`. Any difference leads to the usual
path, which checks everything.
"""

from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad
from torch.nn import functional as F

from pyfeedback.backends.dispatch import choices, innermost, open_blocks, plan, tables
from pyfeedback.core.call import LayerCall
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import Convolution, Geometry
from pyfeedback.core.response import is_costly
from pyfeedback.core.tensors import PLAIN
from pyfeedback.ops.autograd import EagerLayer, keeps_plain, read_feedback, saved_weight, with_feedback

_function_mode_is_enabled = torch._C._is_torch_function_mode_enabled
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks

_NO_BIAS = torch.empty(0)  # TensorGuards compares tensors only, and no tensor twice


class Recalled:
    """The last call of a layer of :mod:`pyfeedback.nn` in eager mode, with its own weights, and how it was computed."""

    __slots__ = ("_call", "_coefficients", "_fprop", "_generation", "_geometry", "_same_tensors", "_saved_weight")

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        geometry: Geometry,
        coefficients: Coefficients,
        call: LayerCall | None,
        saved: tuple[str, bool] | None,
    ):
        self._same_tensors = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        self._geometry, self._coefficients = geometry, coefficients
        self._fprop = geometry.fprop if isinstance(geometry, Convolution) else F.linear  # a Python call less
        self._call = call  # None if PyTorch's own backward is used, with B in place of W
        self._saved_weight = saved  # the attribute of its node
        self._generation = choices.generation

    def __reduce__(self):
        """A copy of a layer recalls nothing."""
        return type(None), ()

    @classmethod
    def of(cls, layer: Any, geometry: Geometry, input: Tensor, output: Tensor) -> "Recalled | None":
        """Recall a call that returned ``output``; None if the next one may have to be computed in another way."""
        if open_blocks:  # of backend: a later call may be outside
            return None
        rule, weight, feedback, bias = layer.rule, layer.weight, layer.feedback, layer.bias
        tensors = (input, weight, feedback, _NO_BIAS if bias is None else bias)
        if (
            rule.signs != "free"
            or rule.expansion
            or any(layer._parameters.get(name) is not t for name, t in (("weight", weight), ("bias", bias)))
            or not PLAIN.issuperset(map(type, tensors))
            or any(isinstance(numbers, list) for numbers in geometry)  # may change in place
            or input.dim() < weight.dim()
            or not weight.numel()
            or tables[input.device]
            or innermost.get() is not None
            or torch._C._is_any_autocast_enabled()
            or torch._C._are_functorch_transforms_active()
            or torch._C._get_tracing_state() is not None
        ):
            return None
        call, coefficients = None, rule.fixed or layer.coefficients_of(geometry, input, weight)
        if feedback.requires_grad:
            if bias is not None and rule.center and is_costly(geometry, output, input, weight, coefficients.samples):
                return None  # the values of the output decide
            mask = (input.requires_grad, weight.requires_grad, True, bias is not None and bias.requires_grad)
            call = plan(geometry, input, weight, coefficients, mask, bias is None)
        elif not keeps_plain(geometry, input, weight, feedback, bias):
            return None
        saved = saved_weight(output.grad_fn) if input.requires_grad else None
        return cls(tensors, geometry, coefficients, call, saved)

    def repeat(self, layer: Any, geometry: Geometry, input: Tensor) -> Tensor | None:
        """The output of the layer for another input; None if the call differs from this one in more than values."""
        parameters = layer._parameters
        weight, feedback, bias = parameters.get("weight"), parameters.get("feedback"), parameters.get("bias")
        if not (
            self._same_tensors(input, weight, feedback, _NO_BIAS if bias is None else bias)
            and (geometry is self._geometry or all(map(is_, geometry, self._geometry)))  # 1.0 equals 1, but is refused
            and self._generation == choices.generation
            and innermost.get() is None
            and not _function_mode_is_enabled()
            and _saved_tensors_hooks(False) is None
            and forward_ad._current_level < 0
        ):
            return None
        if self._call is not None and torch.is_grad_enabled():
            return EagerLayer.apply(input, weight, feedback, bias, geometry, self._coefficients, self._call)
        output = self._fprop(input, weight, bias)
        node = output.grad_fn
        if node is None:
            return output
        if self._saved_weight is None:
            return with_feedback(output, input, feedback)
        read_feedback(node, *self._saved_weight, feedback)
        return output
