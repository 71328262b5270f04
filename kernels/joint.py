"""Launches the weight gradient and the input gradient of a small layer as one."""

import torch

from .dgrad import plan_dgrad
from .joint_kernel import joint_kernel
from .launch import Plan, architecture
from .tiles import RESIDENT, DgradTile, WgradTile
from .wgrad import plan_wgrad

# Arguments of dgrad_kernel that have the name, but not the value, of one of wgrad_kernel.
RENAMED = {
    "p_feedback": "p_kernel",
    "p_x": "p_input",
    "p_mean": "p_input_mean",
    "p_unit": "p_z_unit",
    "N": "n",
    "SAMPLE": "DSAMPLE",
    "BC": "DBC",
    "BK": "DBK",
}


def launch_joint(
    wgrad: dict, dgrad: dict, tiles: tuple[WgradTile, DgradTile], device: torch.device, programs: int | None = None
) -> None:
    """What ``launch_wgrad(**wgrad)`` and ``launch_dgrad(**dgrad)`` compute, of one layer, with these tiles.

    Args:
        wgrad, dgrad: their arguments. Neither may write what the other reads.
        programs: how many share the tiles; as many as run at once if it is None.
    """
    plan = joint_plan(
        plan_wgrad(**wgrad, tile=tiles[0]),
        plan_dgrad(**dgrad, tile=tiles[1]),
        programs or RESIDENT * architecture(device)[1],
    )
    plan.launch(joint_kernel, device)


def joint_plan(wgrad: Plan, dgrad: Plan, programs: int) -> Plan:
    """Both plans as one, of as many programs."""
    arguments, constants = (
        {RENAMED.get(name, name): value for name, value in named.items()}
        for named in (dgrad.arguments, dgrad.constants)
    )
    sizes = {"wgrad_tiles": wgrad.grid[0], "dgrad_tiles": dgrad.grid[0], "dgrad_classes": dgrad.grid[1]}
    tiles = wgrad.grid[0] * wgrad.grid[1] + dgrad.grid[0] * dgrad.grid[1]
    return Plan(
        (min(tiles, programs), 1), arguments | wgrad.arguments | sizes, constants | wgrad.constants, wgrad.tile
    )  # fmt: skip
