"""The autograd formula of a layer, and the three wrappers that PyTorch needs for it.

The formula is :func:`gradients`. It computes all gradients as planned by :func:`pyfeedback.backends.dispatch.plan` in
the forward pass. Double backward is not supported.

* :func:`forward_with_feedback` needs no formula: if the feedback has no gradient and no kernel of this package is
  faster, the backward of the plain layer is correct with B in place of the saved W. It costs what the plain layer does.
* :class:`EagerLayer` is a Function whose forward receives the context. This form has the least overhead: two thirds of
  that of the dispatcher on a tiny layer.
* :class:`TransformableLayer` sets up its context separately from its forward, as torch.func requires. This costs a
  third more on a tiny layer, so it is used only inside a transform.
* :func:`register_formula` registers the formula for the ops themselves, for the dispatcher and torch.compile. Compilers
  do not support a Function with symbolic numbers in all releases, and torch 2.10 computes a wrong gradient. A compiled
  graph has PyTorch's own layer in its forward pass. The backward of a feedback that learns is an op, a single node.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyfeedback.backends.dispatch import current_backend, is_composed, is_plain, plan, stays_plain, tables, use_backend
from pyfeedback.core.call import DIFFERENTIATED_ONCE, Gradients, LayerCall
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import Geometry
from pyfeedback.core.response import exceeds_bias, is_costly
from pyfeedback.core.tensors import PLAIN
from pyfeedback.ops.schemas import LIBRARY


def gradients(call: LayerCall, grad_output: Tensor, saved: Sequence[Tensor | None]) -> Gradients:
    """Compute the gradients of input, weight, feedback and bias from the saved input, weight, feedback and response."""
    if torch.is_grad_enabled():
        refuse_double_backward()
    # backward() called inside of an autocast block must not cast again. The first test is cheap and mostly false.
    if torch._C._is_any_autocast_enabled() and autocasts(grad_output.device.type):
        with torch.autocast(grad_output.device.type, enabled=False):
            return call.chosen.backward(call, grad_output, *saved)
    return call.chosen.backward(call, grad_output, *saved)


def refuse_double_backward() -> None:
    """Raise in a backward pass with create_graph=True."""
    if torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(DIFFERENTIATED_ONCE)


_SAVED_WEIGHT = {
    "ConvolutionBackward0": ("_raw_saved_weight", False),
    "AddmmBackward0": ("_raw_saved_mat2", True),
    "MmBackward0": ("_raw_saved_mat2", True),
}
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0")  # of the output of a linear layer with more than two dimensions
_pack = ().__contains__  # returns False for any tensor, faster than a Python function


def forward_with_feedback(
    geometry: Geometry, input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None
) -> Tensor | None:
    """The output of a layer whose feedback needs no gradient, with PyTorch's own backward; None if not possible."""
    if (
        not keeps_plain(geometry, input, weight, feedback, bias)
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        or forward_ad._current_level >= 0
    ):
        return None
    return with_feedback(geometry.fprop(input, weight, bias), input, feedback)


def keeps_plain(geometry: Geometry, input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None) -> bool:
    """Whether PyTorch's own backward is correct and the fastest for such a layer, with B in place of W."""
    return (
        is_plain(geometry, weight.shape, "cpu" if input.is_cpu else input.device.type, current_backend())
        and (not tables[input.device] or stays_plain(geometry, input, weight, bias))
        and PLAIN.issuperset((type(input), type(weight), type(feedback)))
        and ((input.is_contiguous() and weight.is_contiguous()) or _are_channels_last(input, weight))
    )


def with_feedback(output: Tensor, input: Tensor, feedback: Tensor) -> Tensor | None:
    """The output of PyTorch's own layer, whose backward will read B in place of W; None if its node is not known."""
    node = output.grad_fn
    if node is None or not input.requires_grad:
        return output
    if node.name() in _VIEWS:
        node = node.next_functions[0][0]
    saved = saved_weight(node)
    if saved is None:
        return None
    read_feedback(node, *saved, feedback)
    return output


def saved_weight(node: Any) -> tuple[str, bool] | None:
    """The attribute of a node that holds the saved weight, and whether it is the transpose; None if not known."""
    return None if node is None else _SAVED_WEIGHT.get(node.name())


def read_feedback(node: Any, attribute: str, is_transposed: bool, feedback: Tensor) -> None:
    """Let the backward of a node read B in place of the weight that it saved, unless B is changed before."""
    version = feedback._version

    def unpack(packed: object) -> Tensor:
        if torch.is_grad_enabled():
            refuse_double_backward()
        if feedback._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                f"feedback weight {list(feedback.shape)} is at version {feedback._version}, expected {version}"
            )
        return feedback.t() if is_transposed else feedback

    getattr(node, attribute).register_hooks(_pack, unpack)


class EagerLayer(torch.autograd.Function):
    """A layer called outside of torch.func and torch.compile.

    The optional last argument is the plan of an earlier call, if that did not depend on the values of the output.
    """

    @staticmethod
    def forward(
        ctx, input, weight, feedback, bias, geometry: Geometry, rule: Coefficients, recalled: LayerCall | None = None
    ):
        output = geometry.fprop(input, weight, bias)
        if output._is_view():
            output = output.data  # like not_a_view, which takes 3 microseconds
        call, saves = recalled, bias is None
        if call is None:
            mask = ctx.needs_input_grad[:4]
            saves = saves or (rule.center and is_costly(geometry, output, input, weight, rule.samples))
            call = plan(geometry, input, weight, rule, mask, saves)
            if saves and call.reads_response and bias is not None:
                saves = exceeds_bias(output[: rule.samples or None], bias, geometry.channel)
                call = call if saves else plan(geometry, input, weight, rule, mask, False)
        ctx.call = call
        response = ctx.kept = None
        if call.reads_response and saves:
            if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
                # Not a saved tensor: autograd would raise an error if the next function changed it in place.
                ctx.kept = output.detach(), output._version
            elif bias is None:  # in-place work often follows a bias
                response = output
        ctx.save_for_backward(input, weight, feedback, response)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors
        if ctx.kept is not None:
            response, version = ctx.kept
            ctx.kept = None  # autograd frees what it has saved after a backward pass
            if response._version == version:  # if not, it is computed again, as in a second pass
                saved = (*saved[:3], response)
        return *gradients(ctx.call, grad_output, saved), None, None, None


class TransformableLayer(torch.autograd.Function):
    """A layer under torch.func: grad and vjp use the formula, vmap is a loop."""

    @staticmethod
    def forward(input, weight, feedback, bias, geometry, rule, backend):
        return not_a_view(geometry.fprop(input, weight, bias))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, feedback, _, *ctx.options = inputs
        ctx.save_for_backward(input, weight, feedback)

    @staticmethod
    def backward(ctx, grad_output):
        grads = _TransformableGradients.apply(grad_output, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[:4])
        return *grads, None, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        outputs = [TransformableLayer.apply(*each) for each in _unstacked(info.batch_size, in_dims, arguments)]
        return torch.stack(outputs), 0


class _TransformableGradients(torch.autograd.Function):
    @staticmethod
    def forward(grad_output, input, weight, feedback, geometry, rule, backend, mask):
        call = plan(geometry, input, weight, rule, mask, False, backend)
        with torch.no_grad():
            return gradients(call, grad_output, (input, weight, feedback, None))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(DIFFERENTIATED_ONCE)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        each = [_TransformableGradients.apply(*a) for a in _unstacked(info.batch_size, in_dims, arguments)]
        stacked = tuple(None if grads[0] is None else torch.stack(grads) for grads in zip(*each, strict=True))
        return stacked, tuple(None if grad is None else 0 for grad in stacked)


def register_formula(
    name: str, geometry_of: Callable[..., Geometry], forward: Callable[..., Tensor], scheduled: bool = False
) -> None:
    """Register the formula for the op ``name``; its backward calls the op ``{name}_backward``.

    A compiler traces this formula. It finds PyTorch's own convolution or linear layer in the forward pass and, if the
    feedback has no gradient, in the backward pass, and chooses the memory formats around them. Around an op that it
    does not know, it would convert every tensor to the memory format of eager mode.

    Args:
        geometry_of: returns the geometry for the arguments of the op after the tensors.
        forward: the implementation of the op.
        scheduled: whether the coefficients are a tensor, after the other tensors. Its values are not read in the
            forward pass, so the response is saved whenever it is available.
    """
    backward_op = getattr(torch.ops.pyfeedback, f"{name}_backward").default

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rule, input, weight, feedback, bias, *arguments):
            output = forward(input, weight, feedback, bias, *arguments, **rule)
            ctx.rule, ctx.arguments, ctx.backend = rule, list(arguments), current_backend()
            ctx.mask = ctx.needs_input_grad[1:5]
            tensors = [ctx.arguments.pop(0)] if scheduled else []
            keep = ctx.mask[2] and bias is None
            if keep and not scheduled:
                geometry = geometry_of(*ctx.arguments)
                keep = plan(geometry, input, weight, Coefficients(**rule), ctx.mask, True).reads_response
            ctx.save_for_backward(input, weight, feedback, output if keep else None, *tensors)
            return output

        @staticmethod
        def backward(ctx, grad_output):
            refuse_double_backward()
            none = (None,) * (len(ctx.arguments) + scheduled)
            with use_backend(ctx.backend):
                saved = ctx.saved_tensors
                if not ctx.mask[2]:
                    input, weight, *_ = saved
                    call = plan(geometry_of(*ctx.arguments), input, weight, Coefficients(), ctx.mask, False)
                    if is_composed(call):
                        return None, *gradients(call, grad_output, saved[:4]), *none
                grads = backward_op(grad_output, *saved, *ctx.arguments, **ctx.rule, output_mask=ctx.mask)
            return None, *grads, *none

    def formula(input, weight, feedback, bias=None, *arguments, **rule):
        return Layer.apply(rule, input, weight, feedback, bias, *arguments)

    LIBRARY.impl(name, formula, "Autograd")
    torch.library.register_autograd(f"pyfeedback::{name}_backward", _refuse, lib=LIBRARY)


def _refuse(ctx, *grads) -> NoReturn:
    raise RuntimeError(DIFFERENTIATED_ONCE)


def not_a_view(output: Tensor) -> Tensor:
    """Return the same memory as a tensor that is not a view.

    Autograd refuses in-place operations on a view that a custom function returns. F.linear returns a view if the input
    has more than two dimensions.
    """
    return torch.ops.aten._unsafe_view.default(output, output.shape) if output._is_view() else output


def _are_channels_last(input: Tensor, weight: Tensor) -> bool:
    """Whether both are, so that PyTorch's own gradients have the strides of their tensors."""
    last = torch.channels_last
    return input.dim() == 4 and input.is_contiguous(memory_format=last) and weight.is_contiguous(memory_format=last)


def autocasts(device_type: str) -> bool:
    """Whether autocast is enabled. The meta device has no autocast, and torch raises an error for it."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _unstacked(size: int, in_dims: tuple, arguments: tuple) -> list[tuple]:
    """The arguments for each element of a batch; an argument without a batch dimension is the same for all."""
    pairs = list(zip(arguments, in_dims, strict=True))
    return [
        tuple(a.select(d, i) if isinstance(a, Tensor) and d is not None else a for a, d in pairs) for i in range(size)
    ]
