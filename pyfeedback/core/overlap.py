"""The memory that tensors of a multi-tensor step share, computed from pointers, sizes and strides.

The rows of a step are updated in order, and each row reads element i of its operands before it writes element i. The
tensor that a row updates may therefore be read by the row itself and by earlier rows of the same chain. In a chain,
each row shares a tensor with the row before it, and one thread updates element i of all rows in order.
Otherwise a written tensor must not share memory. `csrc/checks/sharing.h` applies the same rule to the compiled steps.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import gt
from typing import Any, NamedTuple

from torch import Tensor

# After this many combinations of indices, two tensors are assumed to overlap. Nested strides need only a few.
MOST_TRIED = 10_000


class Operand(NamedTuple):
    """A tensor of a step: operand ``order`` of row ``row``; an operand of all rows has row -1."""

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
    """The number of bytes from the first element of ``tensor`` to the end of its last one."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize if tensor.numel() else 0


def are_disjoint(begins: Sequence[int], ends: Sequence[int]) -> bool:
    """Whether no two of the spans begins[i] .. ends[i] overlap, so that sorted begins and ends alternate."""
    return not any(map(gt, sorted(ends), islice(sorted(begins), 1, None)))


def conflict(
    extents: list[tuple[int, int, int, int]],
    operand: Callable[[int, int], Operand],
    chains: Callable[[], Sequence[int]],
) -> tuple[Operand, Operand] | None:
    """Two operands that share memory in an unsupported way, the later one first.

    Args:
        extents: (begin, end, row, order) of each operand that is not empty; begin and end contain it, in bytes.
        operand: returns the operand (row, order).
        chains: returns the chain of each row. Both functions are called only if extents overlap.
    """
    for cluster in _clusters(sorted(extents)):
        operands = sorted((operand(row, order) for *_, row, order in cluster), key=lambda o: o.begin)
        for overlapping in _clusters(operands):
            found = _conflict_among(overlapping, chains())
            if found is not None:
                return found
    return None


def _clusters(ordered: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield the runs of two or more overlapping items; the items (begin, end, ...) are sorted by begin."""
    first, reach = 0, 0
    for i, item in enumerate(ordered):
        if item[0] >= reach:
            if i - first > 1:
                yield ordered[first:i]
            first = i
        reach = max(reach, item[1])
    if len(ordered) - first > 1:
        yield ordered[first:]


def _conflict_among(operands: Sequence[Operand], chains: Sequence[int]) -> tuple[Operand, Operand] | None:
    """Two operands in conflict, of operands whose spans overlap; the later one first."""
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
    """Whether both exist and are the same elements in the same order."""
    if a is None or b is None or a is b:
        return a is b and a is not None
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.dtype == b.dtype
        and all(m == n or size == 1 for m, n, size in zip(a.stride(), b.stride(), a.shape, strict=True))
    )


def _share_a_byte(a: Operand, b: Operand) -> bool:
    """Whether a.begin + sum(stride * index) + byte is equal for a and b, for some indices and bytes."""
    terms: dict[int, int] = {1: 0}
    for tensor in (a.tensor, b.tensor):
        terms[1] += tensor.itemsize - 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            step = stride * tensor.itemsize
            terms[step] = terms.get(step, 0) + size - 1
    # The indices of b count down from the last one, so every term adds: the total is the distance plus the span of b.
    return reachable(b.end - 1 - a.begin, terms)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of ``tensor`` share memory."""
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    reach, nested = 0, True
    for stride, size in dims:
        nested = nested and stride > reach
        reach += stride * (size - 1)
    if nested or not tensor.numel():
        return False
    # Search for two indices whose first difference is in dimension k and at least 1.
    for k, (stride, size) in enumerate(dims):
        terms = {stride: size - 2}
        for other, count in dims[k + 1 :]:
            terms[other] = terms.get(other, 0) + 2 * (count - 1)
        if reachable(sum(s * (n - 1) for s, n in dims[k + 1 :]) - stride, terms):
            return True
    return False


def reachable(total: int, terms: dict[int, int]) -> bool:
    """Whether ``total`` is a sum of k * step over the terms (step, most), with some k in 0..most for each.

    Also returns True if the search takes more than MOST_TRIED tries.
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
