"""The data terms of a rule whose coefficients have no unit: each is divided by the power of what it reads.

With x the input of the samples, P the number of output positions of all of them, N B = wgrad(conv_transpose(y, B), y)
and X the second moment of the windows of x::

    amp      -amp wgrad(x, y) / (P p)          p = mean of x^2
    null     null N B / q                      q = <B, N B> / <B, B>
    sparse   wgrad(x, conv(x, sparse B - amp W)) / (P l), with amp in it, and l the largest eigenvalue of X / P

On white noise of any amplitude the amp term is -amp W. The null term has the norm of about null B, whatever y is. The
sparse term makes the same step along the direction in which x varies most, whatever x is.
"""

import torch
from torch import Tensor

from pyfeedback.backends.composite.centered_factors import centered
from pyfeedback.core.algorithm import Algorithm
from pyfeedback.core.call import LayerCall
from pyfeedback.core.tensors import acc_dtype, blend

POWER_STEPS = 4  # of the power iteration for the largest eigenvalue, from equal weights for all elements of a window
POWER_SHARE = 8  # it uses one of so many samples


def normalized_gradient(call: LayerCall, x: Tensor, y: Tensor | None, weight: Tensor, feedback: Tensor) -> Tensor:
    """The amp, null and sparse terms of dR/dB, in float32 or wider; y is None if the algorithm does not read it."""
    rule, geometry = call.rule, call.geometry
    x, wide = centered(x, call), acc_dtype(x.dtype)
    y = centered(y, call) if y is not None else None
    gram = geometry.gram(x).to(wide) if call.algorithm is Algorithm.INPUT_GRAM else None
    total = torch.zeros_like(weight, dtype=wide)
    if rule.sparse:
        scale = max(abs(rule.sparse), abs(rule.amp))
        kernel = blend(feedback, weight, rule.sparse / scale, rule.amp / scale).to(x.dtype)
        moved = geometry.wgrad(x, geometry.fprop(x, kernel), weight).to(wide)
        total += moved * _divided(scale, _largest_eigenvalue(call, x, weight))
    elif rule.amp:
        positions = geometry.sizes(x.shape, weight.shape, 0).positions
        power = torch.linalg.vector_norm(x, dtype=wide).square() * (positions / max(x.numel(), 1))
        if gram is not None:
            amplified = weight.flatten(1).to(wide) @ gram
        else:
            assert y is not None
            amplified = geometry.wgrad(x, y, weight).to(wide)
        total -= amplified.view_as(weight) * _divided(rule.amp, power)
    if rule.null:
        spread = _spread(call, x, y, gram, weight, feedback)
        size = feedback.to(wide).square().sum()
        total += spread * _divided(rule.null * size, (spread * feedback).sum())
    return total


def _spread(
    call: LayerCall, x: Tensor, y: Tensor | None, gram: Tensor | None, weight: Tensor, feedback: Tensor
) -> Tensor:
    """N B = wgrad(conv_transpose(y, B), y), from the gram matrix of x or of y if the algorithm uses one."""
    geometry, wide = call.geometry, acc_dtype(x.dtype)
    if call.algorithm is Algorithm.DIRECT:
        assert y is not None
        return geometry.wgrad(geometry.dgrad(y, feedback, x), y, weight).to(wide)
    w, b = weight.flatten(1).to(wide), feedback.flatten(1).to(wide)
    if gram is not None:
        return (w @ gram @ w.t() @ b).view_as(weight)
    assert y is not None
    return (geometry.gram(y).to(wide) @ b).view_as(weight)


def _largest_eigenvalue(call: LayerCall, x: Tensor, weight: Tensor) -> Tensor:
    """The largest eigenvalue of the second moment of the windows of x, summed over positions, by power iteration.

    The start and all iterates have one output channel for each group.
    """
    geometry, wide = call.geometry, acc_dtype(x.dtype)
    part = x[: -(-x.shape[0] // POWER_SHARE)]
    transposed = getattr(geometry, "transposed", False)
    channels = (weight.shape[0], 1) if transposed else (geometry.groups, weight.shape[1])
    vector = torch.ones(*channels, *weight.shape[2:], dtype=x.dtype, device=x.device)
    value = torch.zeros((), dtype=wide, device=x.device)
    for _ in range(POWER_STEPS):
        vector = vector * _divided(1.0, torch.linalg.vector_norm(vector, dtype=wide)).to(x.dtype)
        vector = geometry.wgrad(part, geometry.fprop(part, vector), vector)
        value = torch.linalg.vector_norm(vector, dtype=wide)
    return value * (x.shape[0] / part.shape[0])


def _divided(numerator: Tensor | float, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the denominator is not positive: nothing was read."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
