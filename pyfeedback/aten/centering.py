"""Which factors of the products of a centred rule are copied and centred.

Both are. In exact arithmetic it is enough to centre y in wgrad(x, y): the mean of x then cancels. In rounded arithmetic
it leaves an error of (mean / standard deviation)^2 units in the last place.
"""

import torch
from torch import Tensor

from pyfeedback.aten.center import wide_dtype
from pyfeedback.forms import Coefficients

LARGE = 2**18  # elements of an input whose copy is worth avoiding


def centered(x: Tensor, rule: Coefficients) -> Tensor:
    """x, or x minus its mean over the samples."""
    return torch.ops.pyfeedback.center.default(x, x.shape[0]) if rule.center else x


def centered_beside(x: Tensor, channel: int, rule: Coefficients) -> Tensor:
    """x as a factor of wgrad(x, y) where y is centred already.

    A copy of the large input of a 1x1 layer costs as much as half a pass of the layer on a CPU: there it is left out
    where the mean is small. On other devices that question would have to be waited for.
    """
    if rule.center and x.is_cpu and x.numel() >= LARGE and not _mean_is_large(x, channel):
        return x
    return centered(x, rule)


def combined(z: Tensor, beta: float, x: Tensor, alpha: float, rule: Coefficients) -> Tensor:
    """beta * z + alpha * x, with x centred where the rule asks for it, written to z; beta or alpha is 1."""
    if not alpha:
        return z
    if rule.center:
        torch.ops.pyfeedback.add_centered_.default(z, x, beta, alpha)
        return z
    return torch.add(z, x, alpha=alpha, out=z) if beta == 1.0 else torch.add(x, z, alpha=beta, out=z)


def _mean_is_large(x: Tensor, channel: int) -> bool:
    """Whether the mean over the samples exceeds 2.5 standard deviations in some channel, judged by two samples.

    A grid of about 64 positions of each is looked at. Where the two samples happen to differ more than most, the
    standard deviation of all n is large as well: the ratio is underestimated by a factor of n ** 0.5 at most.
    """
    channel %= x.dim()
    points = round(64 ** (1 / max(1, x.dim() - 2)))  # along each dimension of the map
    steps = [1 if d == channel else -(-size // points) for d, size in enumerate(x.shape)]
    steps[0] = max(1, x.shape[0] // 2)
    grid = x[tuple(slice(None, None, step) for step in steps)].movedim(channel, -1).to(wide_dtype(x.dtype))
    first, other = (grid[i].reshape(-1, x.shape[channel]) for i in (0, min(1, len(grid) - 1)))
    power, difference = first.square().sum(0), (first - other).square().sum(0)  # the latter of two variances
    return bool((power > (1 + 2.5**2) / 2 * difference).any())
