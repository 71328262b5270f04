"""The gradient of a rule that reads white noise instead of data, composed of PyTorch's own kernels."""

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.probes import basis_size
from pyfeedback.core.tensors import acc_dtype, blend


def probe_gradient(weight: Tensor, feedback: Tensor, noise: Tensor, rule: Coefficients) -> Tensor:
    """dR/dB of all terms but tie, with n probes in place of the data.

    Args:
        weight, feedback: [G, K, d], the kernels of each group as matrices.
        noise: [n, d], white, with a mean square of 1; each group reads the same.
        rule: ``center`` and ``samples`` have no effect.

    Returns:
        [G, K, d] in the dtype of ``noise``::

            decay B - self W - amp y'x / n + null y'y B / (n q) + sparse B x'x / n,    y = x W'

        with q = 1, or <B, y'y B> / (n <B, B>) with ``normalize``.
    """
    n = noise.shape[0]
    w, b = weight.to(noise.dtype), feedback.to(noise.dtype)
    total = blend(b, w, rule.decay, rule.self_) if rule.decay or rule.self_ else torch.zeros_like(b)
    if rule.sparse:  # amp is folded in, so that the result is exact where B is near W
        total.add_((blend(b, w, rule.sparse, rule.amp) @ noise.t()) @ noise, alpha=1 / n)
    elif rule.amp:
        total.add_((w @ noise.t()) @ noise, alpha=-rule.amp / n)
    if rule.null:
        spread = _spread(noise @ w.mT, b)
        power = (spread * b).sum()
        scale = torch.where(power > 0, b.square().sum() / power, 0.0) if rule.normalize else 1 / n
        total.add_(spread.mul_(rule.null * scale))
    return total


def _spread(response: Tensor, b: Tensor) -> Tensor:
    """y'y B, by the product that is cheaper."""
    n, k, d = response.shape[-2], *b.shape[-2:]
    if n * k + k * d < 2 * n * d:
        return (response.mT @ response) @ b
    return response.mT @ (response @ b)


def random_signs(count: int, size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs [count, size], white noise with a mean square of 1, in float32 or wider.

    Their second moment has an exact diagonal, and each of them takes one random bit.
    """
    bits = torch.randint(-(2**63), 2**63 - 1, (-(-count * size // 64),), generator=generator, device=like.device)
    signs = F.embedding(bits.view(torch.uint8).int(), _table(acc_dtype(like.dtype), like.device))
    return signs.view(-1)[: count * size].view(count, size)


def orthogonal_probes(inputs: int, start: int, stop: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Probes ``start`` to ``stop`` of a random orthogonal basis, [stop - start, inputs], in float32 or wider.

    The basis is a Hadamard matrix, or its Kronecker product with a cosine transform if d is not a power of two, with
    random signs of the columns and its rows in random order. All of it has x'x = n I, where n is
    :func:`pyfeedback.core.probes.basis_size` of d.
    """
    size, dtype = basis_size(inputs), acc_dtype(like.dtype)
    power = (size & -size).bit_length() - 1
    odd = size >> power
    signs = random_signs(1, size, like, generator)
    rows = torch.randperm(size, generator=generator, device=like.device)[start:stop]
    found = _cosines(odd, dtype, like.device)[rows % odd]
    rows = rows // odd
    while power:
        bits = min(power, 6)
        factor = _hadamard(bits, dtype, like.device)[rows % 2**bits]
        found = (factor.unsqueeze(2) * found.unsqueeze(1)).flatten(1)
        rows, power = rows >> bits, power - bits
    return found[:, :inputs] * signs[:, :inputs]


@cache
def _hadamard(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix of signs [n, n], with n = 2^bits rows that are orthogonal."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    for _ in range(bits):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@cache
def _cosines(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The rows of the discrete cosine transform (DCT-II) [n, n], which are orthogonal, with a mean square of 1."""
    frequency, position = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi / size * frequency * (position + 0.5)) * math.sqrt(2)
    rows[0] = 1.0
    return rows.to(device, dtype)


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs of each byte: [256, 8]"""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (2 * bits - 1).to(device, dtype)
