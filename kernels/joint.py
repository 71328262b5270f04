"""A joint launch: the weight gradient and the input gradient together, for a layer too small to fill a GPU with either.

The programs of a persistent grid first compute the tiles of the weight gradient, which take longer, and then those of
the input gradient.
"""

import triton
import triton.language as tl

from .dgrad import dgrad_kernel
from .launch import Launch
from .tiles import PROGRAMS_PER_PROCESSOR
from .wgrad import wgrad_kernel


@triton.jit
def joint_kernel(
    wgrad_arguments,  # the arguments of wgrad_kernel, without compile-time constants
    dgrad_arguments,  # of dgrad_kernel
    wgrad_programs,
    dgrad_tiles,
    W_STRIDES: tl.constexpr,
    F_STRIDES: tl.constexpr,
    PHASES: tl.constexpr,
    GEO: tl.constexpr,
    WGRAD_FLAGS: tl.constexpr,
    WGRAD_TILE: tl.constexpr,
    DGRAD_FLAGS: tl.constexpr,
    DGRAD_TILE: tl.constexpr,
):
    n_dgrad = dgrad_tiles * (GEO.stride[0] * GEO.stride[1])
    for i in range(tl.program_id(0), wgrad_programs + n_dgrad, tl.num_programs(0)):
        if i < wgrad_programs:
            wgrad_kernel(*wgrad_arguments, W_STRIDES, F_STRIDES, GEO, WGRAD_FLAGS, WGRAD_TILE, i)
        else:
            i_dgrad = i - wgrad_programs
            dgrad_kernel(
                *dgrad_arguments, PHASES, GEO, DGRAD_FLAGS, DGRAD_TILE, i_dgrad % dgrad_tiles, i_dgrad // dgrad_tiles
            )


def joint_launch(wgrad: Launch, dgrad: Launch, processors: int, programs: int | None = None) -> Launch:
    """Combine both launches of one layer. Neither may write a tensor that the other reads.

    Args:
        wgrad, dgrad: with tiles of the same number of warps and stages.
        programs: the number of programs that share the tiles; by default, as many as are resident at once.
    """
    tiles = wgrad.grid[0] + dgrad.grid[0] * dgrad.grid[1]
    arguments = {"wgrad_arguments": tuple(wgrad.arguments.values()), "dgrad_arguments": tuple(dgrad.arguments.values())}
    arguments |= {"wgrad_programs": wgrad.grid[0], "dgrad_tiles": dgrad.grid[0]}
    constants = {}
    for name, launch in (("WGRAD", wgrad), ("DGRAD", dgrad)):
        for constant, value in launch.constants.items():
            constants[f"{name}_{constant}" if constant in ("FLAGS", "TILE") else constant] = value
    return wgrad._replace(
        kernel=joint_kernel,
        products=wgrad.products + dgrad.products,
        grid=(min(tiles, programs or PROGRAMS_PER_PROCESSOR * processors), 1),
        arguments=arguments,
        constants=constants,
        operands=wgrad.operands | dgrad.operands,
    )
