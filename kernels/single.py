"""Launches the single pass of a pointwise layer."""

import torch
from torch import Tensor

from .geometry import Geometry
from .launch import Plan, architecture, arrivals, precision, require, sample_size, wide
from .single_kernel import single_kernel
from .tiles import SingleTile, choose_single


def launch_single(
    x: Tensor,
    geometry: Geometry,
    term: str,
    *,
    dy: Tensor,
    dx: Tensor,
    dw: Tensor,
    feedback: Tensor,
    y: Tensor | None = None,
    f: Tensor | None = None,
    weight: Tensor | None = None,
    mean: Tensor | None = None,
    unit: Tensor | None = None,
    z_scale: float = 1.0,
    x_scale: float = 0.0,
    scale: float = 1.0,
    decay: float = 0.0,
    self_: float = 0.0,
    tie: float = 0.0,
    tf32: bool = False,
    tile: SingleTile | None = None,
) -> None:
    """dx = convT(dy, feedback), dw = wgrad(x, dy), and the feedback's gradient f, from one read of x, dy and y.

    Args:
        x, dx: [N, 1, 1, C] contiguous, float16, bfloat16 or float32; dy: [N, 1, 1, K]; y: [n, 1, 1, K], n <= N.
        feedback, weight, dw: [K, C] contiguous, of x's dtype; dw may be float32 beside 16-bit operands.
        term: what f is, with its coefficients decay, self_ and tie as in :func:`launch_wgrad`:
            "none" (those terms alone; f may be absent), "response" (scale * unit * y'x + ...),
            "projection" (scale * unit * y'z + ..., z = (z_scale * y feedback - x_scale * x) / unit),
            or "moment" (x'x alone), where x is minus its mean.
        f: [K, C] contiguous; for "moment" [C, C] in float32.
        mean: [positions of a sample, C] in float32; 0 if it is None.
        unit: [1] in float32, what a 1 in y (response) or in z (projection) stands for; 1 if it is None.

    Raises:
        ValueError: an operand has another shape, or no tile of these sizes fits a processor.
    """
    require(geometry, x=x, dy=dy, dx=dx)
    if y is not None:
        require(geometry._replace(N=y.shape[0]), y=y)
    capability, processors = architecture(x.device)
    tile = tile or choose_single(geometry, term, x.element_size(), capability, processors, mean is not None)
    if tile is None:
        raise ValueError(f"term is {term!r} of {geometry.C} -> {geometry.K} channels, expected sums that fit")
    if term == "moment" and tile.BC < geometry.C:
        raise ValueError(f"tile is {tile}, expected BC >= {geometry.C} where the term is a moment")
    flags = {
        "HAS_F": f is not None,
        "USE_X": term == "projection" and x_scale != 0,
        "USE_WEIGHT": f is not None and self_ != 0,
        "USE_FEEDBACK": f is not None and decay != 0,
        "USE_TIE": f is not None and tie != 0,
    }
    columns = -(-geometry.C // tile.BC)
    partial = arrived = None
    if tile.splits > 1:
        slot = (tile.BK + single_rows(term, tile)) * tile.BC
        partial = torch.empty(columns * tile.splits * slot, dtype=torch.float32, device=x.device)
        arrived = arrivals(columns * tile.splits, x.device)
    arguments = {
        "p_x": x,
        "p_dy": dy,
        "p_y": y,
        "p_feedback": feedback,
        "p_weight": weight if flags["USE_WEIGHT"] else None,
        "p_dx": dx,
        "p_dw": dw,
        "p_f": f,
        "p_mean": None if term == "none" else mean,
        "p_unit": unit,
        "p_partial": partial,
        "p_arrived": arrived,
        "positions": geometry.positions,
        "used": 0 if y is None else y.shape[0],
        "z_scale": z_scale,
        "x_scale": x_scale,
        "scale": scale,
        "decay": decay,
        "self_": self_,
        "tie": tie,
    }
    sample = sample_size(geometry, mean)
    constants = single_constants(geometry, term, flags, sample, wide(geometry), precision(x.dtype, tf32), tile)
    Plan((columns, tile.splits), arguments, constants, tile).launch(single_kernel, x.device)


def single_rows(term: str, tile: SingleTile) -> int:
    """Rows of the second sum."""
    return {"none": 0, "moment": tile.BC}.get(term, tile.BK)


def single_constants(
    geometry: Geometry, term: str, flags: dict[str, bool], sample: int, wide: bool, precision: str, tile: SingleTile
) -> dict[str, int | bool | str]:
    """The compile-time arguments of the kernel; ``sample`` is the number of rows of the mean."""
    blocks = {"BK": tile.BK, "BC": tile.BC, "BP": tile.BP, "SPLITS": tile.splits}
    return {
        "C": geometry.C,
        "K": geometry.K,
        "TERM": term,
        **flags,
        "SAMPLE": sample,
        "WIDE": wide,
        "PRECISION": precision,
        **blocks,
        "LEVELS": (tile.splits - 1).bit_length(),
    }
