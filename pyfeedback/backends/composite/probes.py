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
    return [composed_gradient(problem, generator_of(problem, seed, step)) for problem in problems]


def generator_of(problem: ProbeProblem, seed: int, step: int) -> torch.Generator:
    """The generator of the noise of a problem."""
    draw = problem.part.draw if problem.part else step
    generator = torch.Generator(problem.weight.device)
    return generator.manual_seed(((seed * 1_000_003 + draw) * 1_000_003 + problem.layer_index) % 2**63)


def composed_gradient(problem: ProbeProblem, generator: torch.Generator) -> Tensor:
    """The gradient of one problem."""
    weight, feedback, count, rule, _, part = problem
    inputs = weight.shape[-1]
    if part is None:
        return probe_gradient(weight, feedback, random_signs(count, inputs, weight, generator), rule)
    if part.is_whole:
        return whole_basis_gradient(weight, feedback, rule)
    noise = orthogonal_probes(inputs, part.start, part.stop, weight, generator)
    return probe_gradient(weight, feedback, noise if part.scale == 1 else noise.mul_(part.scale), rule)


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
        add_null_(total, noise @ w.mT, b, rule, 1 / n)
    return total


def whole_basis_gradient(weight: Tensor, feedback: Tensor, rule: Coefficients) -> Tensor:
    """:func:`probe_gradient` with a whole orthogonal basis, for which x'x = n I."""
    wide = acc_dtype(weight.dtype)
    w, b = weight.to(wide), feedback.to(wide)
    total = blend(b, w, rule.decay + rule.sparse, rule.self_ + rule.amp)
    if rule.null:
        add_null_(total, w.mT, b, rule, 1.0)
    return total


def add_null_(total: Tensor, response: Tensor, b: Tensor, rule: Coefficients, scale: float) -> None:
    """Add the null term: null scale y'y B, or null <B, B> / <B, y'y B> y'y B with ``normalize``.

    Args:
        response: y [G, n, K]
    """
    n, k, d = response.shape[-2], *b.shape[-2:]
    if n * k + k * d < 2 * n * d:  # the Gram matrix is cheaper
        spread = response.mT @ response @ b
        factor = _normalized(rule.null, b, (spread * b).sum()) if rule.normalize else rule.null * scale
        total.add_(spread.mul_(factor))
        return
    projected = response @ b
    projected *= _normalized(rule.null, b, projected.square().sum()) if rule.normalize else rule.null * scale
    total.baddbmm_(response.mT, projected)


def _normalized(null: float, b: Tensor, power: Tensor) -> Tensor:
    """null <B, B> / <B, y'y B>, or 0 if nothing responded."""
    return torch.where(power > 0, null * b.square().sum() / power, 0.0)


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
    signs, rows = draw_basis(inputs, start, stop, like, generator)
    order, power = basis_factors(signs.numel())
    found = paley_matrix(order, signs.dtype, like.device)[rows >> power]
    while power:
        bits = power % 6 or 6
        power -= bits
        factor = _sylvester(bits, signs.dtype, like.device)[(rows >> power) % 2**bits]
        found = (found.unsqueeze(2) * factor.unsqueeze(1)).flatten(1)
    return found[:, :inputs] * signs[:inputs]


def draw_basis(inputs: int, start: int, stop: int, like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The signs [n] of the columns of a random orthogonal basis, and the rows of the probes in the Hadamard matrix.

    The matrix is the Kronecker product of Paley's, of the order that :func:`pyfeedback.core.hadamard.basis_factors`
    returns, and Sylvester's.
    """
    size = basis_size(inputs)
    signs = random_signs(1, size, like, generator).view(size)
    return signs, torch.randperm(size, generator=generator, device=like.device)[start:stop]


@cache
def _sylvester(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's Hadamard matrix of order 2^bits."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    for _ in range(bits):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@cache
def paley_matrix(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Paley's Hadamard matrix of this order."""
    bits = torch.tensor(paley_rows(order))[:, None] >> torch.arange(order) & 1
    return (1 - 2 * bits).to(device, dtype)


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs of each byte: [256, 8]"""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (2 * bits - 1).to(device, dtype)
