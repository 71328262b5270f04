"""Centering of the factors in the products of a rule with ``center``.

Both factors are centered. In exact arithmetic, it would be enough to center y in wgrad(x, y), because the mean of x
then cancels. In rounded arithmetic, this leaves an error of (mean / standard deviation)^2 units in the last place, and
in 16 bits one of mean / standard deviation, since the rounded y does not sum to zero over the samples.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pyfeedback.core.call import LayerCall
from pyfeedback.core.tensors import acc_dtype

LARGE = 2**18  # elements of an input whose copy is worth avoiding
BLOCK = 2**18  # elements of a block
MOST_MACS_OF_OUTPUT = 256  # of a layer that is bound by memory
FEWEST_MACS = 128  # for each element that is centered; with fewer, blocks are not faster


def centered(x: Tensor, call: LayerCall) -> Tensor:
    """x, or x minus its mean over the samples."""
    return call.chosen.center(x, x.shape[0]) if call.rule.center else x


def responds_to_centered(x: Tensor, y: Tensor | None, weight: Tensor) -> bool:
    """Whether conv(x, W) of the centered x takes less time than centering y, which is None if it was not saved.

    On a GPU, a layer with few products for each output, as the first of a network, is bound by memory. Its response is
    written once, and centering would move it three times.
    """
    if x.is_cpu or y is None:
        return not x.is_cpu
    return x.itemsize == 2 and weight[0].numel() <= MOST_MACS_OF_OUTPUT and x.numel() <= y.numel()


def centered_factor(x: Tensor, call: LayerCall) -> Tensor:
    """x as a factor of wgrad(x, y) if y is already centered.

    On a CPU, a centered copy of the large input of a 1x1 layer costs half a pass of the layer, so it is made only if
    the mean is large. On other devices, the decision would synchronize, so the copy is always made.
    """
    large = call.rule.center and x.is_cpu and x.numel() >= LARGE
    return x if large and not _mean_is_large(x, call.geometry.channel) else centered(x, call)


def centered_gram(x: Tensor, call: LayerCall) -> Tensor:
    """x'x [C, C] of the centered input of a pointwise layer."""
    c = x.shape[call.geometry.channel] if x.numel() >= LARGE else 0
    if c < FEWEST_MACS or not _has_blocks(x, call):
        return call.geometry.gram(centered(x, call))
    gram = x.new_zeros(c, c)
    for (block,) in _blocks(call, x):
        gram.addmm_(block.t(), block)
    return gram


def centered_products(
    x: Tensor, y: Tensor, weight: Tensor, call: LayerCall, gram: bool
) -> tuple[Tensor, Tensor | None] | None:
    """y'x and, if ``gram``, y'y, of centered factors; None if the layer is not pointwise or blocks are not faster."""
    k, c = weight.shape[:2]
    if x.numel() < LARGE or k * c < FEWEST_MACS * (k + c) or not (_has_blocks(x, call) and _has_blocks(y, call)):
        return None
    if not call.geometry.sizes(x.shape, weight.shape, 0).is_product:
        return None
    cross, square = x.new_zeros(k, c), x.new_zeros(k, k) if gram else None
    for x_block, y_block in _blocks(call, x, y):
        cross.addmm_(y_block.t(), x_block)
        if square is not None:
            square.addmm_(y_block.t(), y_block)
    return cross, square


def _has_blocks(x: Tensor, call: LayerCall) -> bool:
    """Whether the products of a large input or response of a pointwise layer are computed in blocks of positions.

    On a CPU, a centered copy of a large tensor takes as long as its product with few channels, since its memory is new.
    The copy of a block stays in a cache.
    """
    if not (call.rule.center and x.is_cpu and x.dtype is acc_dtype(x.dtype)):
        return False
    rows = _rows(x, call)
    return rows.is_contiguous() and rows.shape[0] * rows.shape[2] <= BLOCK


def _blocks(call: LayerCall, *activations: Tensor) -> Iterator[list[Tensor]]:
    """Blocks of a few positions of all samples, centered, as matrices [N * positions, channels]."""
    rows = [_rows(t, call) for t in activations]
    samples, positions, _ = rows[0].shape
    step = max(1, BLOCK // (samples * sum(t.shape[-1] for t in rows)))
    for start in range(0, positions, step):
        yield [call.chosen.center(t[:, start : start + step], samples).flatten(0, 1) for t in rows]


def _rows(t: Tensor, call: LayerCall) -> Tensor:
    """[N, positions, channels]; contiguous, and a view, if channels are innermost."""
    return t.movedim(call.geometry.channel, -1).flatten(1, -2) if t.dim() > 2 else t.unsqueeze(1)


def combined(z: Tensor, beta: float, x: Tensor, alpha: float, call: LayerCall) -> Tensor:
    """beta * z + alpha * x, with x centered if the rule centers it, written to z; beta or alpha is 1."""
    if not alpha:
        return z
    if call.rule.center:
        call.chosen.add_centered_(z, x, beta, alpha)
        return z
    return torch.add(z, x, alpha=alpha, out=z) if beta == 1.0 else torch.add(x, z, alpha=beta, out=z)


def _mean_is_large(x: Tensor, channel: int) -> bool:
    """Whether the mean over the samples exceeds 2.5 standard deviations in some channel, estimated from two samples.

    About 64 positions of each are read. If the two samples differ more than most do, the standard deviation of all n
    is large as well: the ratio is underestimated by a factor of at most n ** 0.5.
    """
    channel %= x.dim()
    points = round(64 ** (1 / max(1, x.dim() - 2)))  # along each dimension of the map
    steps = [1 if d == channel else -(-size // points) for d, size in enumerate(x.shape)]
    steps[0] = max(1, x.shape[0] // 2)
    grid = x[tuple(slice(None, None, step) for step in steps)].movedim(channel, -1).to(acc_dtype(x.dtype))
    first, other = (grid[i].reshape(-1, x.shape[channel]) for i in (0, min(1, len(grid) - 1)))
    power, difference = first.square().sum(0), (first - other).square().sum(0)  # the latter of two variances
    return bool((power > (1 + 2.5**2) / 2 * difference).any())
