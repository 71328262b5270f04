"""The backward of a feedback layer from the fused Triton kernels, where they apply.

What is launched, by the form that computes the rule's data terms:

    none             dW, and the feedback gradient in its epilogue
    direct           amp or sparse: dW and the feedback gradient, wgrad(x, u), in one launch;
                     null: dx and z in one launch, then the feedback gradient, wgrad(z, y)
    input_moment     dW and G = x'x, of few channels in one launch, then products of K x C
    response_moment  Y = y'y; dW and y'x in one launch, then products of K x C; or as direct, where one pass can

A pointwise layer whose sums fit one processor has all of it, dx, dW and y'x or wgrad(z, y) or G, in a single pass.
Of a small layer dx is in one launch with the first weight gradient, or dW with the first input gradient. A rule that
reads fewer samples than the batch has, or centred inputs, launches apart what then reads other memory.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from triton.runtime import JITFunction

from .geometry import Geometry, conv_geometry
from .launch import DTYPES, MOST_POSITIONS
from .rule import Backward, Center, Layer, feedback_gradient, strided_like
from .wgrad_kernel import wgrad_kernel

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

FEWEST_CHANNELS = 16  # one step of a tensor core: a layer with fewer, a network's first, is mostly padding
_INTERPRETED = not isinstance(wgrad_kernel, JITFunction)


def takes(input: Tensor, weight: Tensor, groups: int = 1) -> bool:
    """True where these kernels compute the layer: 16-bit or float32, one group, enough channels, on a GPU."""
    if input.numel() == 0 or groups != 1 or min(weight.shape[:2]) < FEWEST_CHANNELS:
        return False
    there = input.device.type == "cuda" or (_INTERPRETED and input.device.type == "cpu")
    return there and input.dtype in DTYPES and input.numel() // weight.shape[1] < MOST_POSITIONS


def conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    response: Tensor | None,
    window: tuple[tuple[int, int], tuple[int, int], tuple[int, int], int],
    rule,
    mask: Sequence[bool],
    *,
    form: str,
    center: Center,
    path: str = "joined",
) -> Gradients:
    """Gradients of input, weight, feedback and bias of a convolution that :func:`takes`; None where ``mask`` is False.

    Args:
        grad_output, response: [N, K, P, Q]; response, conv(input, weight), is computed where it is None and needed.
        input: [N, C, H, W], any strides; weight, feedback: [K, C, R, S].
        window: stride, padding, dilation, groups.
        rule: a named tuple with decay, amp, null, sparse, self_, tie, center and samples.
        form: what computes the data terms, by name, see above; the moments are those of a pointwise layer.
        center: center(t, n) is t[:n] minus its mean over dimension 0.
        path: "joined", or "apart" without single passes and joint launches.
    """
    stride, padding, dilation, _ = window
    pointwise = weight.shape[2:] == (1, 1) and tuple(padding) == (0, 0)

    def read(t: Tensor) -> Tensor:
        """The positions that are read: a strided 1x1 convolution is a dense one on those."""
        return t[:, :, :: stride[0], :: stride[1]] if pointwise else t

    def block(t: Tensor) -> Tensor:
        t = t.permute(0, 2, 3, 1)
        return (t.reshape(-1, 1, 1, t.shape[-1]) if pointwise else t).contiguous()

    seen = read(input)
    geometry = conv_geometry(seen.shape, weight.shape, (1, 1) if pointwise else stride, padding, dilation)
    layer = Layer(
        geometry=geometry.flat(),
        rows=geometry.P * geometry.Q if pointwise else 1,
        weight=weight,
        respond=lambda x, kernel: torch.conv2d(x, kernel, None, *window),
        block_input=lambda t: block(read(t)),
        block_output=block,
        tf32=torch.backends.cudnn.conv.fp32_precision == "tf32",
        joined=path == "joined",
    )
    dx, grad_weight, grad_feedback = _gradients(
        layer, grad_output, input, feedback, response, rule, mask, form, center
    )  # fmt: skip
    grad_input = None
    if dx is not None:
        n, c, h, w = seen.shape
        grad_input = dx.view(n, h, w, c).permute(0, 3, 1, 2)
        if seen.shape != input.shape:
            dense, grad_input = grad_input, torch.zeros_like(input)
            read(grad_input).copy_(dense)
        grad_input = strided_like(grad_input, torch.empty_like(input))
    return grad_input, grad_weight, grad_feedback, grad_output.sum((0, 2, 3)) if mask[3] else None


def linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    feedback: Tensor,
    response: Tensor | None,
    rule,
    mask: Sequence[bool],
    *,
    form: str,
    center: Center,
    path: str = "joined",
) -> Gradients:
    """The same for a linear layer: input [N, ..., C], grad_output and response [N, ..., K], weight [K, C]."""
    k, c = weight.shape

    def block(t: Tensor) -> Tensor:
        return t.reshape(-1, 1, 1, t.shape[-1]).contiguous()

    layer = Layer(
        geometry=Geometry(input.numel() // c, c, k),
        rows=prod(input.shape[1:-1]),
        weight=weight,
        respond=lambda x, kernel: x @ kernel.t(),
        block_input=block,
        block_output=block,
        tf32=torch.backends.cuda.matmul.fp32_precision == "tf32",
        joined=path == "joined",
    )
    dx, grad_weight, grad_feedback = _gradients(
        layer, grad_output, input, feedback, response, rule, mask, form, center
    )  # fmt: skip
    grad_input = None if dx is None else strided_like(dx.view(input.shape), torch.empty_like(input))
    return grad_input, grad_weight, grad_feedback, grad_output.reshape(-1, k).sum(0) if mask[3] else None


def _gradients(
    layer: Layer,
    grad_output: Tensor,
    input: Tensor,
    feedback: Tensor,
    response: Tensor | None,
    rule,
    mask: Sequence[bool],
    form: str,
    center: Center,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx as a block, dW and the feedback's gradient in the layout of the weight."""
    need_input, need_weight, need_feedback = mask[:3]
    x, dy = layer.block_input(input), layer.block_output(grad_output)
    tied = need_feedback and rule.tie != 0
    # Beside data terms a later launch may read dW back: rounded once more, and infinite where tie * dW is not.
    wide = torch.float32 if tied and form != "none" else None
    dw = torch.empty_like(layer.weight, dtype=wide) if need_weight or tied else None
    dx = torch.empty_like(x) if need_input else None
    launches = Backward(layer, x, dy, feedback, dw, dx)
    grad_feedback = feedback_gradient(launches, input, response, rule, form, center) if need_feedback else None
    launches.finish_weight()
    launches.finish_input()
    return dx, dw.to(layer.weight.dtype) if dw is not None and need_weight else None, grad_feedback
