"""Plans and launches the input gradients: checks and one kernel."""

from torch import Tensor

from .dgrad_kernel import dgrad_kernel
from .geometry import Geometry
from .launch import Plan, architecture, precision, require, sample_size, wide
from .tiles import DgradTile, choose_dgrad


def launch_dgrad(feedback: Tensor, geometry: Geometry, **terms) -> None:
    """Launch what :func:`plan_dgrad` plans, whose arguments these are."""
    plan_dgrad(feedback, geometry, **terms).launch(dgrad_kernel, feedback.device)


def plan_dgrad(
    feedback: Tensor,
    geometry: Geometry,
    *,
    dy: Tensor | None = None,
    y: Tensor | None = None,
    x: Tensor | None = None,
    dx: Tensor | None = None,
    z: Tensor | None = None,
    mean: Tensor | None = None,
    unit: Tensor | None = None,
    z_scale: float = 1.0,
    x_scale: float = 0.0,
    tf32: bool = False,
    tile: DgradTile | None = None,
) -> Plan:
    """dx = convT(dy, feedback), and z = (z_scale * convT(y, feedback) - x_scale * (x - mean)) / unit, in one launch.

    Args:
        feedback: [K, R, S, C] contiguous, float16, bfloat16 or float32.
        dy, y: [N, P, Q, K] contiguous; each may be absent with its product.
        x: [N, H, W, C] contiguous, read where ``x_scale`` is not 0.
        dx, z: [N, H, W, C] contiguous, written.
        mean: [positions of a sample, C] in float32; 0 if it is None.
        unit: [1] in float32, what a 1 in z stands for; 1 if it is None.
        tf32: float32 products may be rounded to TensorFloat-32.
    """
    dual = dy is not None and y is not None
    flags = {"HAS_DX": dy is not None, "HAS_Z": y is not None, "USE_X": y is not None and x_scale != 0}
    require(geometry, dy=dy, y=y, x=x, dx=dx, z=z)
    tile = tile or choose_dgrad(geometry, dual, feedback.element_size(), architecture(feedback.device)[0])
    arguments = {
        "p_dy": dy,
        "p_y": y,
        "p_feedback": feedback,
        "p_x": x if flags["USE_X"] else None,
        "p_dx": dx,
        "p_z": z,
        "p_mean": mean if flags["USE_X"] else None,
        "p_unit": unit if flags["HAS_Z"] else None,
        "N": geometry.N,
        "z_scale": z_scale,
        "x_scale": x_scale,
    }
    sample = sample_size(geometry, mean)
    constants = dgrad_constants(geometry, flags, sample, wide(geometry), precision(feedback.dtype, tf32), tile)
    return Plan(dgrad_grid(geometry, tile), arguments, constants, tile)


def dgrad_grid(geometry: Geometry, tile: DgradTile) -> tuple[int, int]:
    """(tiles of the largest class, classes of input positions modulo the stride)"""
    g = geometry
    positions = g.N * -(-g.H // g.stride[0]) * -(-g.W // g.stride[1])
    return -(-positions // tile.BM) * -(-g.C // tile.BC), g.stride[0] * g.stride[1]


def dgrad_constants(
    geometry: Geometry, flags: dict[str, bool], sample: int, wide: bool, precision: str, tile: DgradTile
) -> dict[str, int | bool | str]:
    """The compile-time arguments of the kernel; ``sample`` is the number of rows of the mean."""
    g = geometry
    sizes = {"C": g.C, "K": g.K, "H": g.H, "W": g.W, "P": g.P, "Q": g.Q, "R": g.R, "S": g.S}
    pairs = {"STRIDE": g.stride, "PAD": g.padding, "DIL": g.dilation}
    window = {f"{name}_{d}": value for name, pair in pairs.items() for d, value in zip("HW", pair, strict=True)}
    blocks = {"BM": tile.BM, "BC": tile.BC, "BK": tile.BK}
    rest = {"SAMPLE": sample, "WIDE": wide, "PRECISION": precision}
    return {**sizes, **window, **g.phases(), **flags, **rest, **blocks}
