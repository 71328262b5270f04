"""Which tensors of a multi-tensor step share memory, found from pointers, sizes and strides alone.

A step reads each element of a row's operands before it writes it, and takes rows in their order. So what a row writes may
be read by the same row, or by rows before it that the same threads step with it: those in a chain of rows that share
what they read (``_chains``). Every other pair of a written tensor and another has no element in common.
`csrc/sharing.h` decides the same for the compiled steps.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

# Combinations of indices that are tried before two tensors count as sharing: nested strides need a handful.
MOST_TRIED = 10_000


class Operand(NamedTuple):
    """A tensor of a step: number ``order`` of the operands of row ``row``; row -1 is for what all rows read."""

    begin: int
    end: int
    row: int
    order: int
    name: str
    tensor: Tensor
    written: bool

    def __str__(self) -> str:
        return self.name if self.row < 0 else f"{self.name}[{self.row}]"


def span(tensor: Tensor) -> int:
    """Bytes from the first element of ``tensor`` to the end of its last one."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize if tensor.numel() else 0


def conflict(
    spans: list[tuple[int, int, int, int]], operand: Callable[..., Operand], chains: Callable[[], Sequence[int]]
) -> tuple[Operand, Operand] | None:
    """Two operands that share memory and may not, the later one first.

    Args:
        spans: (begin, end, row, order) of each operand that is not empty; sorted by this function.
        operand: the operand of a span.
        chains: gives each row's chain, and is called where spans overlap.
    """
    spans.sort()
    first, count = 0, len(spans)
    while first < count:
        reach, last = spans[first][1], first + 1
        while last < count and spans[last][0] < reach:
            reach = max(reach, spans[last][1])
            last += 1
        if last - first > 1:
            found = _conflict_among([operand(*each) for each in spans[first:last]], chains())
            if found is not None:
                return found
        first = last
    return None


def _conflict_among(operands: list[Operand], chains: Sequence[int]) -> tuple[Operand, Operand] | None:
    """Of operands whose spans overlap."""
    for i, a in enumerate(operands):
        for j, b in enumerate(operands):
            if a.written and i != j and (j > i or not b.written) and _clash(a, b, chains):
                return (a, b) if (a.row < 0, a.row, a.order) > (b.row < 0, b.row, b.order) else (b, a)
    return None


def _clash(written: Operand, other: Operand, chains: Sequence[int]) -> bool:
    if written.end <= other.begin or other.end <= written.begin:
        return False
    if (
        not other.written
        and written.order == 0
        and 0 <= other.row <= written.row
        and chains[other.row] == chains[written.row]
        and is_same(other.tensor, written.tensor)
    ):
        return False
    return _share_a_byte(written, other)


def is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are there and are the same elements in the same order."""
    return (
        a is not None
        and b is not None
        and a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.dtype == b.dtype
        and all(m == n or size == 1 for m, n, size in zip(a.stride(), b.stride(), a.shape, strict=True))
    )


def _share_a_byte(a: Operand, b: Operand) -> bool:
    """Whether a.begin + sum(stride * index) + byte equals the same of b for some indices and bytes."""
    terms: dict[int, int] = {1: 0}
    for tensor in (a.tensor, b.tensor):
        terms[1] += tensor.itemsize - 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            step = stride * tensor.itemsize
            terms[step] = terms.get(step, 0) + size - 1
    # An index of b counts down from its last, so that every term adds: the sum wanted is the distance plus b's span.
    return reachable(b.end - 1 - a.begin, terms)


def has_shared_places(tensor: Tensor) -> bool:
    """Whether two elements of ``tensor`` lie at one place."""
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    reach, nested = 0, True
    for stride, size in dims:
        nested = nested and stride > reach
        reach += stride * (size - 1)
    if nested or not tensor.numel():
        return False
    # Two indices that differ, the first time in dimension k and there by 1 or more.
    for k, (stride, size) in enumerate(dims):
        terms = {stride: size - 2}
        for other, count in dims[k + 1 :]:
            terms[other] = terms.get(other, 0) + 2 * (count - 1)
        if reachable(sum(s * (n - 1) for s, n in dims[k + 1 :]) - stride, terms):
            return True
    return False


def reachable(total: int, terms: dict[int, int]) -> bool:
    """Whether ``total`` is a sum of k * step over the terms (step, most), each with some k in 0..most.

    True too where that takes more than MOST_TRIED tries to find out.
    """
    steps = sorted((step, most) for step, most in terms.items() if step and most)
    within = [0]  # the largest sum of the first terms
    for step, most in steps:
        within.append(within[-1] + step * most)
    tried = 0

    def search(total: int, count: int) -> bool:
        nonlocal tried
        tried += 1
        if tried > MOST_TRIED:
            return True
        if count == 0 or not 0 <= total <= within[count]:
            return total == 0
        step, most = steps[count - 1]
        least = max(0, -((within[count - 1] - total) // step))
        return any(search(total - step * k, count - 1) for k in range(least, min(most, total // step) + 1))

    return search(total, len(steps))
