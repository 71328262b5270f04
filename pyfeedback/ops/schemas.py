"""The schemas of all ops.

`fa_*` and `feedback_step_` are public and documented in :mod:`pyfeedback.functional`. `center` and `add_centered_` are
steps of the backward of `fa_*`. `mix` computes the feedback of pfa. `scheduled_layer` takes the coefficients as a
tensor. `extension_*` are implemented by the compiled library and called only by :mod:`pyfeedback.backends`.
"""

import torch

from pyfeedback.core.coefficients import Coefficients

_TYPES = {"center": "bool", "samples": "SymInt", "normalize": "bool"}
_RULE = ", ".join(
    f"{_TYPES.get(name, 'float')} {name}={default}" for name, default in Coefficients._field_defaults.items()
)
_SCHEDULED = "bool center, SymInt samples, SymInt positions, bool normalize=False"
_WINDOW = "int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1"
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"
_LAYER = "Tensor input, Tensor weight, Tensor feedback, Tensor? bias"
_SAVED = "Tensor grad_output, Tensor input, Tensor weight, Tensor feedback, Tensor? response"
_MASK = "bool[4] output_mask=[True, True, True, True]"
_GRADS = "(Tensor grad_input, Tensor grad_weight, Tensor grad_feedback, Tensor grad_bias)"
_STEP = (
    "Tensor(a!)[] feedback, Tensor[] weight, Tensor[] grad, Tensor(b!)[] momentum_buffer, *, "
    "float[] decay, float[] self_, float[] tie, float lr, float momentum=0.0, bool nesterov=False, "
    "float noise=0.0, int seed=0, bool skip_nonfinite=False, Tensor? dynamic=None"
)
_ADAMW = (
    "Tensor(a!)[] param, Tensor[] weight, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Tensor(d!)[] step, *, float[] decay, float[] self_, float[] tie, float[] weight_decay, "
    "float lr, float beta1, float beta2, float eps"
)

_PROBES = (
    "Tensor weight, Tensor feedback, Tensor signs, Tensor rows, Tensor paley, float[] coefficients, bool need_response"
)

_ADD_CENTERED = "(Tensor(a!) self, Tensor input, float beta, float alpha) -> ()"

_DEPTHWISE = (
    "Tensor grad_output, Tensor input, Tensor weight, Tensor feedback, "
    "Tensor? mean, Tensor? response, Tensor? response_mean, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, float[] coefficients, int samples, "
    "bool need_input, bool need_weight, bool need_feedback, bool need_bias"
)

_DENSE = (
    "Tensor grad_output, Tensor input, Tensor weight, Tensor feedback, int[2] stride, int[2] padding, int[2] dilation, "
    "float[] coefficients, bool center, int samples, bool need_input, bool need_weight, bool need_feedback, "
    "bool need_bias"
)

SCHEMAS = {
    "fa_conv2d": f"({_LAYER}=None, {_WINDOW}, *, {_RULE}) -> Tensor",
    "fa_convolution": f"({_LAYER}, {_GEOMETRY}, *, {_RULE}) -> Tensor",
    "fa_linear": f"({_LAYER}=None, *, {_RULE}) -> Tensor",
    "fa_conv2d_backward": f"({_SAVED}=None, {_WINDOW}, *, {_RULE}, {_MASK}) -> {_GRADS}",
    "fa_convolution_backward": f"({_SAVED}, {_GEOMETRY}, *, {_RULE}, {_MASK}) -> {_GRADS}",
    "fa_linear_backward": f"({_SAVED}=None, *, {_RULE}, {_MASK}) -> {_GRADS}",
    "scheduled_layer": f"({_LAYER}, Tensor coefficients, {_GEOMETRY}, *, {_SCHEDULED}) -> Tensor",
    "scheduled_layer_backward": f"({_SAVED}, Tensor coefficients, {_GEOMETRY}, *, {_SCHEDULED}, {_MASK}) -> {_GRADS}",
    "feedback_step_": f"({_STEP}) -> ()",
    "extension_adamw_step_": f"({_ADAMW}) -> ()",
    "extension_dense_backward": f"({_DENSE}) -> {_GRADS}",
    "extension_depthwise_backward": f"({_DEPTHWISE}) -> {_GRADS}",
    "extension_feedback_step_": f"({_STEP}) -> ()",
    "extension_alignment_products": "(Tensor[] feedback, Tensor[] weight) -> Tensor",
    "extension_probe_gradients": f"({_PROBES}) -> (Tensor gradient, Tensor response)",
    "mix": "(Tensor mixing, Tensor feedback, float decay) -> Tensor",
    "center": "(Tensor input, SymInt samples) -> Tensor",
    "add_centered_": _ADD_CENTERED,
    "extension_center": "(Tensor input, SymInt samples) -> Tensor",
    "extension_add_centered_": _ADD_CENTERED,
}

LIBRARY = torch.library.Library("pyfeedback", "DEF")
for _name, _schema in SCHEMAS.items():
    # The backward of a layer accepts any strides, so a compiler need not convert its tensors to those of eager mode.
    _any_strides = _name.endswith("_backward") and not _name.startswith("extension")
    LIBRARY.define(_name + _schema, tags=torch.Tag.flexible_layout if _any_strides else ())
