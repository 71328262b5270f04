"""A model of the time of kernels on a GPU: what each moves, multiplies and issues, at the rates of the data sheet.

The time of a kernel is the longest of three, plus that of its launch:

    bytes          each tensor that it reads or writes once, at REACHED["copy"] of the memory's bandwidth
    products       its floating-point operations, at REACHED["product"] of the peak for bfloat16
    instructions   of the Triton kernels as compiled for sm_90, four for each processor and cycle

No latency, no second-level cache and no difference between cuDNN's kernels is modelled: times are lower bounds for each
of the candidates, and nothing here was measured on a GPU.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from gpu_layers import FEWEST_CHANNELS, Layer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pyfeedback import Rule
from pyfeedback.backends import dispatch
from pyfeedback.core.geometry import Convolution
from pyfeedback.kernels.launch import Launch, in_order
from pyfeedback.kernels.plan import Plan, Problem, plan_backward
from pyfeedback.kernels.wgrad import wgrad_kernel

BATCH, DTYPE = 128, torch.bfloat16
CAPABILITY = 90  # of the instructions that were counted
INSTRUCTIONS = Path(__file__).parent / "results" / f"instructions-sm_{CAPABILITY}.json"

REACHED = {"copy": 0.9, "product": 0.8}  # of the peaks, by large copies and products; assumed
LAUNCH = 2e-6  # seconds from the end of a kernel to the start of the next, in a graph or behind a queue; assumed
ISSUED = 4  # warp instructions of a processor in a cycle


class Device(NamedTuple):
    """Peaks of a data sheet: dense bfloat16 products with float32 sums, and memory."""

    tflop_s: float
    gb_s: float
    processors: int
    flop_cycle: int  # of a processor, dense bfloat16
    capability: int
    source: str

    @property
    def clock(self) -> float:
        """The clock in Hz at which the peak is stated."""
        return self.tflop_s * 1e12 / (self.processors * self.flop_cycle)


DEVICES = {
    "a100": Device(312, 2039, 108, 2048, 80, "NVIDIA A100 80GB SXM data sheet"),
    "h100": Device(989.4, 3350, 132, 4096, 90, "NVIDIA H100 SXM data sheet"),
    "h200": Device(989.4, 4800, 132, 4096, 90, "NVIDIA H200 SXM data sheet"),
    "b200": Device(2250, 8000, 148, 8192, 100, "NVIDIA HGX B200 data sheet, one of eight GPUs"),
    "rtx4090": Device(165.2, 1008, 128, 512, 89, "NVIDIA Ada GPU architecture, appendix: GeForce RTX 4090"),
    "rtx5090": Device(209.5, 1792, 170, 512, 120, "NVIDIA RTX Blackwell GPU architecture: GeForce RTX 5090"),
}


class Work(NamedTuple):
    """One kernel."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    cycles: float = 0.0  # that a processor needs to issue its instructions; 0 if they were not counted
    filled: float = 1.0  # the fraction of the processors that have a program, averaged over its waves

    def seconds(self, device: Device) -> float:
        """The modelled time."""
        products = self.flops / (device.tflop_s * 1e12 * REACHED["product"] * self.filled)
        moved = self.bytes / (device.gb_s * 1e9 * REACHED["copy"])
        return max(products, moved, self.cycles / device.clock) + LAUNCH

    def limit(self, device: Device) -> str:
        """Which of the three it is."""
        bare = self._replace(cycles=0.0).seconds(device)
        if self.seconds(device) > bare:
            return "instructions"
        return "products" if self._replace(flops=0.0, cycles=0.0).seconds(device) < bare else "bytes"


def seconds(works: list[Work], device: Device) -> float:
    """The time of kernels one after another."""
    return sum(work.seconds(device) for work in works)


# Kernels that read an input twice: sums first, then the result.
_READ_TWICE = {"native_batch_norm": (0,), "native_batch_norm_backward": (0, 1)}
_NOT_READ = ("copy_", "fill_", "zero_", "zeros_like", "ones_like")  # the first argument is only written, or a shape
_NO_KERNEL = ("empty", "new_empty", "detach", "_unsafe_view", "lift_fresh")  # prefixes


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if func.is_view or name.startswith(_NO_KERNEL):
            return out
        if name == "convolution_backward":
            self.works += _convolution_backward(args, out)
            return out
        if name == "convolution":
            args = (_read(*args[:2], args[3]), *args[1:])
        read = list(args[name in _NOT_READ :])
        read += [args[i] for i in _READ_TWICE.get(name, ())]
        moved = _bytes(read) + _bytes({k: v for k, v in kwargs.items() if k != "out"}) + _bytes(out)
        count = flop_registry.get(func._overloadpacket)
        self.works.append(Work(name, count(*args, **kwargs, out_val=out) if count else 0.0, moved))
        return out


def _convolution_backward(args: tuple, out: tuple) -> Iterator[Work]:
    """One kernel for each gradient."""
    dy, x, w, _, stride = args[:5]
    macs = dy.numel() * math.prod(w.shape[1:]) if not args[7] else x.numel() * math.prod(w.shape[1:])
    read = {"dgrad": (dy, w), "wgrad": (dy, _read(x, w, stride)), "sum": (dy,)}
    for (name, operands), result in zip(read.items(), out, strict=True):
        if result is not None:
            yield Work(name, 0.0 if name == "sum" else 2.0 * macs, _bytes((operands, result)))


def _read(x: Tensor, w: Tensor, stride: list[int]) -> Tensor:
    """The part of its input that a convolution reads: of one with a 1x1 kernel, every stride-th position."""
    if math.prod(w.shape[2:]) > 1:
        return x
    return x[(..., *(slice(None, None, step) for step in stride))]


def _bytes(tree: Any) -> int:
    """The bytes of the elements of all tensors; of an expanded dimension, one."""
    tensors = [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
    sizes = (math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step) for t in tensors)
    return sum(size * t.itemsize for size, t in zip(sizes, tensors, strict=True))


@contextmanager
def traced() -> Iterator[list[Work]]:
    """Collect the kernels that PyTorch would run inside the block: one for each call of ATen that is no view."""
    with _Calls() as calls:
        yield calls.works


@contextmanager
def traced_launches(counts: dict[str, dict[str, int]], device: Device) -> Iterator[list[Work]]:
    """As :func:`traced`, for a backward pass by the Triton kernels: with their launches, which are not started."""

    class Launcher:
        def __init__(self, plan: Plan):
            self.launches = in_order(plan.launches)

        def run(self, _: dict[str, Any]) -> None:
            works.extend(launch_work(launch, counts.get(key(launch)), device) for launch in self.launches)

    def planned(problem: Problem, _: torch.device) -> tuple[Plan, Launcher]:
        plan = plan_backward(problem)
        return plan, Launcher(plan)

    architecture = mock.Mock(return_value=(device.capability, device.processors))
    with (
        traced() as works,
        mock.patch.multiple("pyfeedback.kernels.backward", planned=planned, architecture=architecture),
    ):
        yield works


def launch_work(launch: Launch, counts: dict[str, int] | None, device: Device) -> Work:
    """The work of a Triton launch; ``counts`` are its instructions, None if they were not counted."""
    moved = sum(math.prod(shape) * (4 if dtype == "float32" else 2) for shape, dtype in launch.operands.values())
    moved += 4 * launch.workspace  # written, or read
    if launch.kernel.__name__.startswith("finish"):
        given = [name for name, value in launch.arguments.items() if name.startswith("p_") and value is not None]
        return Work(str(launch), 0.0, moved + 2 * (len(given) - 1) * launch.workspace / launch.tile.splits)
    if launch.kernel.__name__.startswith("joint"):
        return Work(str(launch), joint_products(launch), moved)
    tiles, waves, flops, steps = tiles_of(launch, device)
    cycles = 0.0
    if counts is not None:
        cycles = launch.tile.warps * (waves * steps * counts["step"] + math.ceil(waves) * counts["once"]) / ISSUED
    return Work(str(launch), flops, moved, cycles, tiles / (waves * device.processors))


def tiles_of(launch: Launch, device: Device) -> tuple[int, float, float, float]:
    """Of a launch that is not joint: its tiles, the time of its waves in that of a whole tile, its floating-point
    operations, and the steps of a whole tile."""
    g, flags, tile = launch.constants["GEO"], launch.constants["FLAGS"], launch.tile
    n, splits = launch.arguments["N"], getattr(tile, "splits", 1)
    tiles = flags.WHOLE + flags.SPLIT_TILES or math.prod(launch.grid)
    waves = -(-(tiles - flags.SPLIT_TILES) // device.processors)
    waves += -(-flags.SPLIT_TILES * splits // device.processors) / splits
    positions = n * g.P * g.Q
    if launch.kernel.__name__.startswith("dgrad"):
        steps = g.R * g.S / math.prod(g.stride) * -(-g.K // tile.BK)
        return tiles, waves, 2.0 * (flags.HAS_DX + flags.HAS_Z) * positions * g.C * g.K * g.R * g.S, steps
    blocks = -(-positions // tile.BP)
    if flags.CENTERED:  # of one position each
        samples = n * g.H * g.W // flags.SAMPLE
        blocks = positions // samples * -(-samples // tile.BP)
    if launch.kernel.__name__.startswith("wgrad"):
        rows = g.K * flags.HAS_A + flags.U * flags.HAS_U * (0.5 if flags.SYMMETRIC else 1.0)
        return tiles, waves, 2.0 * positions * rows * g.C * g.R * g.S, blocks
    products = 2 * g.K + {"none": 0, "cross": g.K, "z": 2 * g.K, "gram": g.C}[flags.TERM]
    return tiles, waves, 2.0 * positions * products * g.C, blocks


def joint_products(launch: Launch) -> float:
    """The floating-point operations of a joint launch."""
    g = launch.constants["GEO"]
    first, second = launch.constants["WGRAD_FLAGS"], launch.constants["DGRAD_FLAGS"]
    n = launch.arguments["wgrad_arguments"][wgrad_kernel.arg_names.index("N")]
    products = g.K * (first.HAS_A + second.HAS_DX + second.HAS_Z) + first.U * first.HAS_U
    return 2.0 * n * g.P * g.Q * products * g.C * g.R * g.S


def key(launch: Launch) -> str:
    """What the machine code of a launch depends on, except for the number of splits, as a short text."""
    constants = {name: value for name, value in launch.constants.items() if name != "TILE"}
    tile = launch.tile._replace(splits=0) if hasattr(launch.tile, "splits") else launch.tile
    given = [value is not None for value in launch.arguments.values()]
    identity = repr((launch.kernel.__name__, sorted(constants.items()), tile, given))
    return f"{launch} {sha256(identity.encode()).hexdigest()[:10]}"


def backward_works(layer: Layer, rule: Rule, device: Device) -> dict[str, list[Work]]:
    """The kernels of a layer's backward pass by each backend that supports it."""
    coefficients = rule.coefficients(BATCH, 1)
    shape_x, shape_y = layer.shapes(BATCH)
    x, w, y = (torch.empty(shape, dtype=DTYPE, device="meta") for shape in (shape_x, layer.weight, shape_y))
    if isinstance(layer.geometry, Convolution):
        x, w, y = (t.to(memory_format=torch.channels_last) for t in (x, w, y))
    mask = (not layer.first, True, coefficients.reads_data, False)
    if rule.transport:  # plain backprop
        with traced() as works:
            layer.geometry.backward(y, x, w, mask[:3])
        return {"composite": works}
    with mock.patch("pyfeedback.kernels.backward.supports", _supports):
        calls = dispatch.layer_calls(layer.geometry, x, w, coefficients, mask, True)
    counts = _instructions() if device.capability == CAPABILITY else {}
    found = {}
    for choice, call in calls.items():
        if choice.algorithm is layer.algorithm(BATCH, coefficients):
            composed = choice.backend == "composite"
            with traced() if composed else traced_launches(counts, device) as works:
                call.chosen.backward(call, torch.empty_like(y), x, w, torch.empty_like(w), y)
            found[choice.backend] = works
    return found


@cache
def _instructions() -> dict[str, dict[str, int]]:
    return json.loads(INSTRUCTIONS.read_text())["launches"]


def _supports(input: torch.Tensor, weight: torch.Tensor, groups: int = 1) -> bool:
    """pyfeedback.kernels.backward.supports, for a GPU that is not there."""
    return groups == 1 and min(weight.shape[:2]) >= FEWEST_CHANNELS
