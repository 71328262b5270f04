"""Norms and inner products of feedback and weight, composed of PyTorch's own kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyfeedback.core import step_checks


def alignment_products(feedback: Sequence[Tensor], weight: Sequence[Tensor]) -> Tensor:
    """<B, B>, <W, W> and <B, W> of each of n pairs, as a float64 tensor [n, 3]."""
    step_checks.check_pairs(feedback, weight)
    rows = []
    for b, w in zip(feedback, weight, strict=True):
        b, w = b.detach().double().flatten(), w.detach().double().flatten()
        rows.append(torch.stack([b.dot(b), w.dot(w), b.dot(w)]))
    return torch.stack(rows) if rows else torch.empty(0, 3, dtype=torch.float64)
