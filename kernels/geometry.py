"""Sizes of one convolution as the kernels see them: pure numbers, no tensors."""

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple


class Geometry(NamedTuple):
    """Input [N, H, W, C], output [N, P, Q, K], kernel [K, R, S, C]: channels innermost, one group."""

    N: int
    C: int
    K: int
    H: int = 1
    W: int = 1
    P: int = 1
    Q: int = 1
    R: int = 1
    S: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def positions(self) -> int:
        """Output positions of the whole batch: what a weight gradient sums over."""
        return self.N * self.P * self.Q

    @property
    def largest(self) -> int:
        """Elements of the larger activation tensor."""
        return max(self.N * self.H * self.W * self.C, self.positions * self.K)

    @property
    def pointwise(self) -> bool:
        """True where every output position reads the input position of the same number and no other."""
        return (self.R, self.S, self.stride, self.padding) == (1, 1, (1, 1), (0, 0))

    def flat(self) -> "Geometry":
        """A pointwise convolution as a linear layer over its positions; any other is returned as it is."""
        return Geometry(self.positions, self.C, self.K) if self.pointwise else self

    def phases(self) -> dict[str, int]:
        """How output rows and columns relate to taps, for each dimension D:

        STEP_D   taps r and r + STEP visit input positions of the same class modulo the stride
        REACH_D  their output positions differ by REACH
        INV_D    tap r = offset / gcd * INV modulo STEP is the first one of the class at that offset
        """
        found = {}
        for name, stride, dilation in zip("HW", self.stride, self.dilation, strict=True):
            common = gcd(stride, dilation)
            step, reach = stride // common, dilation // common
            found |= {f"STEP_{name}": step, f"REACH_{name}": reach, f"INV_{name}": pow(reach, -1, step)}
        return found


def conv_geometry(
    input: Sequence[int],
    weight: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Geometry:
    """Geometry of an input (N, C, H, W) and a kernel (K, C, R, S) of one group."""
    (n, c, h, w), (k, _, r, s) = input, weight
    p, q = (
        (size + 2 * pad - d * (reach - 1) - 1) // step + 1
        for size, pad, d, reach, step in zip((h, w), padding, dilation, (r, s), stride, strict=True)
    )
    return Geometry(n, c, k, h, w, p, q, r, s, tuple(stride), tuple(padding), tuple(dilation))
