"""The gradient of a rule that reads white noise instead of data, composed of PyTorch's own kernels."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.hadamard import basis_factors, basis_size, paley_rows
from pyfeedback.core.probes import ProbeProblem
from pyfeedback.core.tensors import acc_dtype, blend


def probe_gradients(problems: Sequence[ProbeProblem], seed: int, step: int) -> list[Tensor]:
    """The gradient of each problem, in float32 or wider; its noise is that of a generator of its device."""
    generators: dict[torch.device, torch.Generator] = {}
    found = []
    for weight, feedback, count, rule, index, part in problems:
        generator = generators.setdefault(weight.device, torch.Generator(weight.device))
        draw, inputs = part.draw if part else step, weight.shape[-1]
        generator.manual_seed(((seed * 1_000_003 + draw) * 1_000_003 + index) % 2**63)
        if part is None:
            noise = random_signs(count, inputs, weight, generator)
        else:
            noise = orthogonal_probes(inputs, part.start, part.stop, weight, generator)
            noise = noise if part.scale == 1 else noise.mul_(part.scale)
        found.append(probe_gradient(weight, feedback, noise, rule))
    return found


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
    """Probes ``start`` to ``stop`` of a random orthogonal basis: signs [stop - start, inputs], in float32 or wider.

    The basis is a Hadamard matrix with random signs of the columns and its rows in random order, without the columns
    behind d. All of it has x'x = n I, with n = :func:`pyfeedback.core.hadamard.basis_size` of d.
    """
    size, dtype = basis_size(inputs), acc_dtype(like.dtype)
    order, power = basis_factors(size)
    signs = random_signs(1, size, like, generator)
    rows = torch.randperm(size, generator=generator, device=like.device)[start:stop]
    found = _paley(order, dtype, like.device)[rows >> power]
    while power:
        bits = min(power, 6)
        factor = _sylvester(bits, dtype, like.device)[rows % 2**bits]
        found = (found.unsqueeze(2) * factor.unsqueeze(1)).flatten(1)
        rows, power = rows >> bits, power - bits
    return found[:, :inputs] * signs[:, :inputs]


@cache
def _sylvester(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's Hadamard matrix of order 2^bits."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    for _ in range(bits):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@cache
def _paley(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Paley's Hadamard matrix of this order."""
    bits = torch.tensor(paley_rows(order))[:, None] >> torch.arange(order) & 1
    return (1 - 2 * bits).to(device, dtype)


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs of each byte: [256, 8]"""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (2 * bits - 1).to(device, dtype)
