"""The sizes of one layer in the notation of the kernels, without tensors."""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd, prod
from typing import NamedTuple

Pair = tuple[int, int]


class Phases(NamedTuple):
    """The relation between output positions and taps, for each of the two dimensions:

    step      taps r and r + step read input positions of the same class modulo the stride
    reach     the difference between their output positions
    inverse   tap r = offset / gcd * inverse modulo step is the first one of the class with this offset
    """

    step: Pair
    reach: Pair
    inverse: Pair


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
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def positions(self) -> int:
        """Output positions of the whole batch, the reduction dimension of a weight gradient."""
        return self.N * self.P * self.Q

    @property
    def wide(self) -> bool:
        """Whether the larger activation tensor needs int64 offsets."""
        return max(self.N * self.H * self.W * self.C, self.positions * self.K) >= 2**31

    @property
    def pointwise(self) -> bool:
        """Whether each output position reads only the input position with the same index."""
        return (self.R, self.S, self.stride, self.padding) == (1, 1, (1, 1), (0, 0))

    def flat(self) -> "Geometry":
        """A pointwise convolution as a linear layer over its positions; any other is returned unchanged."""
        return Geometry(self.positions, self.C, self.K) if self.pointwise else self

    def constants(self) -> "Geometry":
        """The compile-time constants, without N, so that a kernel is compiled once for all batch sizes."""
        return self._replace(N=0)

    def phases(self) -> Phases:
        """The relation between output positions and taps."""
        common = [gcd(*pair) for pair in zip(self.stride, self.dilation, strict=True)]
        step = tuple(stride // c for stride, c in zip(self.stride, common, strict=True))
        reach = tuple(dilation // c for dilation, c in zip(self.dilation, common, strict=True))
        return Phases(step, reach, tuple(pow(r, -1, s) for r, s in zip(reach, step, strict=True)))


def conv_geometry(input: Sequence[int], weight: Sequence[int], stride: Pair, padding: Pair, dilation: Pair) -> Geometry:
    """The geometry of an input (N, C, H, W) and a kernel (K, C, R, S) of one group."""
    (n, c, h, w), (k, _, r, s) = input, weight
    p, q = (
        (size + 2 * pad - d * (reach - 1) - 1) // step + 1
        for size, pad, d, reach, step in zip((h, w), padding, dilation, (r, s), stride, strict=True)
    )
    return Geometry(n, c, k, h, w, p, q, r, s, tuple(stride), tuple(padding), tuple(dilation))


@lru_cache(4096)
def layer_geometry(
    input: tuple[int, ...], weight: tuple[int, ...], convolution: tuple[Pair, Pair, Pair] | None
) -> tuple[Geometry, int, Geometry | None]:
    """The geometry of a layer, the number of entries of its dimension N that belong to one sample, and ``strided``.

    A linear layer (``convolution`` is None) and a 1x1 convolution without padding become linear layers over their
    positions. If the convolution is strided, these are the positions that it reads; ``strided`` is then the geometry
    with all positions, and otherwise None.
    """
    if convolution is None:
        return Geometry(prod(input[:-1]), weight[1], weight[0]), prod(input[1:-1]), None
    geometry = conv_geometry(input, weight, *convolution)
    if (geometry.R, geometry.S, geometry.padding) == (1, 1, (0, 0)):
        read = Geometry(geometry.positions, geometry.C, geometry.K)
        return read, geometry.P * geometry.Q, None if geometry.pointwise else geometry
    return geometry, 1, None
