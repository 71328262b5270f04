"""Plans and launches the weight gradients: checks, layouts, workspace, one kernel."""

import torch
from torch import Tensor

from .geometry import Geometry
from .launch import Plan, architecture, arrivals, precision, require, sample_size, wide
from .tiles import WgradTile, choose_wgrad, row_tiles, wgrad_tiles
from .wgrad_kernel import wgrad_kernel


def launch_wgrad(x: Tensor, geometry: Geometry, **terms) -> None:
    """Launch what :func:`plan_wgrad` plans, whose arguments these are."""
    plan_wgrad(x, geometry, **terms).launch(wgrad_kernel, x.device)


def plan_wgrad(
    x: Tensor,
    geometry: Geometry,
    *,
    a: Tensor | None = None,
    u: Tensor | None = None,
    dw: Tensor | None = None,
    f: Tensor | None = None,
    weight: Tensor | None = None,
    feedback: Tensor | None = None,
    mean: Tensor | None = None,
    unit: Tensor | None = None,
    scale: float = 1.0,
    decay: float = 0.0,
    self_: float = 0.0,
    tie: float = 0.0,
    tf32: bool = False,
    tile: WgradTile | None = None,
) -> Plan:
    """dw = wgrad(x, a), and f = scale * unit * wgrad(x - mean, u) + decay * feedback - self_ * weight + tie * dw.

    Args:
        x: [N, H, W, C] contiguous, float16, bfloat16 or float32.
        a, u: [N, P, Q, K] and [N, P, Q, U] contiguous, of x's dtype. Without ``a``, ``dw`` is only read; without
            ``u``, its term is 0. Of a pointwise layer's x'x (``u`` is ``x``, nothing else asked for) the blocks on and
            below the diagonal are computed, and mirrored.
        dw, f: [K, R, S, C] and [U, R, S, C] of any strides, written; each may be float32 beside 16-bit operands.
        weight, feedback: of f's shape and strides; read where their coefficient is not 0.
        mean: [positions of a sample, C] in float32, subtracted from x, and from ``u`` where it is ``x``, for f alone.
        unit: [1] in float32, what a 1 in ``u`` (or ``x``) stands for; 1 if it is None.
        tie: not with a U other than K; ``dw`` then has f's strides.
        tf32: float32 products may be rounded to TensorFloat-32.

    Sums are kept in float32 and the same bit for bit however the programs are scheduled.
    """
    rows = (geometry.K if a is not None else 0, u.shape[-1] if u is not None else 0)
    out_rows = rows[1] or geometry.K
    flags = {
        "HAS_A": a is not None,
        "HAS_U": u is not None,
        "HAS_F": f is not None,
        "USE_FEEDBACK": f is not None and decay != 0,
        "USE_WEIGHT": f is not None and self_ != 0,
        "USE_TIE": f is not None and tie != 0,
        "SYMMETRIC": u is x and a is None and geometry.pointwise and not (decay or self_ or tie),
        "MOMENT": u is x,
    }
    require(geometry, x=x, a=a, u=u)
    if flags["USE_TIE"] and out_rows != geometry.K:
        raise ValueError(f"tie is {tie}, expected 0 where u has {out_rows} channels and the weight {geometry.K} rows")
    capability, processors = architecture(x.device)
    means = centered_operands(x, u, mean)
    tile = tile or choose_wgrad(
        geometry, rows, x.element_size(), capability, processors, flags["SYMMETRIC"], means=means
    )
    if flags["USE_TIE"] and flags["HAS_A"] and flags["HAS_U"] and tile.BK != tile.BU:
        raise ValueError(f"tile is {tile}, expected BK == BU where tie joins both products")
    if flags["SYMMETRIC"] and geometry.C > tile.BC and tile.BU != tile.BC:
        raise ValueError(f"tile is {tile}, expected BU == BC where the product is symmetric")
    sample = sample_size(geometry, mean)
    constants = wgrad_constants(geometry, out_rows, flags, sample, wide(geometry), precision(x.dtype, tf32), tile)
    tiles = wgrad_tiles(geometry, rows, (tile.BK, tile.BU, tile.BC), flags["SYMMETRIC"])
    partial = arrived = None
    if tile.splits > 1:
        partial = torch.empty(tiles * tile.splits * (tile.BK + tile.BU) * tile.BC, dtype=torch.float32, device=x.device)
        arrived = arrivals(tiles * tile.splits, x.device)
    arguments = {
        "p_x": x,
        "p_a": a,
        "p_u": u,
        "p_dw": dw if flags["HAS_A"] or flags["USE_TIE"] else None,
        "p_f": f,
        "p_mean": mean if flags["HAS_U"] else None,
        "p_unit": unit if flags["HAS_U"] else None,
        "p_weight": weight if flags["USE_WEIGHT"] else None,
        "p_feedback": feedback if flags["USE_FEEDBACK"] else None,
        "p_partial": partial,
        "p_arrived": arrived,
        "N": geometry.N,
        "scale": scale,
        "decay": decay,
        "self_": self_,
        "tie": tie,
        **_strides("w", dw),
        **_strides("f", f),
    }
    return Plan((tiles, tile.splits), arguments, constants, tile)


def centered_operands(x: Tensor, u: Tensor | None, mean: Tensor | None) -> int:
    """How many operands of f are centred while they are loaded: none, x, or x and u where u is x."""
    return 0 if u is None or mean is None else 1 + (u is x)


def wgrad_constants(
    geometry: Geometry, u: int, flags: dict[str, bool], sample: int, wide: bool, precision: str, tile: WgradTile
) -> dict[str, int | bool | str]:
    """The compile-time arguments of the kernel; ``u`` is the number of rows of f, ``sample`` of the mean."""
    g = geometry
    rows = (g.K if flags["HAS_A"] else 0, u if flags["HAS_U"] else 0)
    sizes = {"C": g.C, "K": g.K, "U": u, "H": g.H, "W": g.W, "P": g.P, "Q": g.Q, "S": g.S}
    pairs = {"STRIDE": g.stride, "PAD": g.padding, "DIL": g.dilation}
    window = {f"{name}_{d}": value for name, pair in pairs.items() for d, value in zip("HW", pair, strict=True)}
    blocks = {"BK": tile.BK, "BU": tile.BU, "BC": tile.BC, "BP": tile.BP}
    return {
        **sizes,
        **window,
        "POINTWISE": g.pointwise,
        **flags,
        "SAMPLE": sample,
        "WIDE": wide,
        "PRECISION": precision,
        **blocks,
        "ROWS": row_tiles(rows, (tile.BK, tile.BU)),
        "SPLITS": tile.splits,
        "LEVELS": (tile.splits - 1).bit_length(),
    }


def _strides(kind: str, t: Tensor | None) -> dict[str, int]:
    """Of a [K, R, S, C] output; zeros where it is absent."""
    k, r, s, c = t.stride() if t is not None else (0, 0, 0, 0)
    return {f"stride_{kind}k": k, f"stride_{kind}c": c, f"stride_{kind}r": r, f"stride_{kind}s": s}
