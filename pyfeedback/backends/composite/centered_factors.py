"""Centering of the factors in the products of a rule with ``center``.

Both factors are centered. In exact arithmetic, it would be enough to center y in wgrad(x, y), because the mean of x
then cancels. In rounded arithmetic, this leaves an error of (mean / standard deviation)^2 units in the last place.
"""

import torch
from torch import Tensor

from pyfeedback.core.call import LayerCall
from pyfeedback.core.tensors import acc_dtype

LARGE = 2**18  # elements of an input whose copy is worth avoiding


def centered(x: Tensor, call: LayerCall) -> Tensor:
    """x, or x minus its mean over the samples."""
    return call.chosen.center(x, x.shape[0]) if call.rule.center else x


def centered_factor(x: Tensor, call: LayerCall) -> Tensor:
    """x as a factor of wgrad(x, y) if y is already centered.

    On a CPU, a centered copy of the large input of a 1x1 layer costs half a pass of the layer, so it is made only if
    the mean is large. On other devices, the decision would synchronize, so the copy is always made.
    """
    large = call.rule.center and x.is_cpu and x.numel() >= LARGE
    return x if large and not _mean_is_large(x, call.geometry.channel) else centered(x, call)


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
