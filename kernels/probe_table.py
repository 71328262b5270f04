"""The launches of probes.py: the table of a set of layers, a pure function of sizes and addresses, and its use."""

import itertools
import random
import struct
from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from .handles import Handle, handles_allowed, make_handle
from .launch import DTYPES, architecture
from .probes import gradient_kernel, moment_kernel, response_kernel

NAMES = {getattr(torch, name): name for name in DTYPES}
NEVER = 2**62  # the first tile of a row without a problem
OLDEST = 80  # compute capability: older processors have no products of bfloat16
MOST_ELEMENTS = 2**30  # of one tensor: offsets are int32, and the last block may extend past them
ALIGNMENT = 16  # elements: every part of the workspace and every gradient begins at a multiple of it
_INTERPRETED = not isinstance(response_kernel, JITFunction)


class Columns(NamedTuple):
    """The columns of the table: the fields of one problem, each an int64, and their number."""

    weight: int = 0  # address
    feedback: int = 1
    w_strides: int = 2  # three columns each: of groups, rows and columns
    b_strides: int = 5
    o_strides: int = 8
    aligned: int = 11  # whether rows of W, B and the gradient are dense and begin at multiples of 16 bytes
    probes: int = 12  # M
    rows: int = 13  # R, of all groups
    group_rows: int = 14  # K
    inputs: int = 15  # d
    index: int = 16  # of the layer, for its noise
    out: int = 17  # offsets of the gradient in p_out, and of the following in p_work
    u: int = 18
    y: int = 19
    y_stride: int = 20  # of one probe to the next, in u and y
    moment: int = 21  # y'y or z
    moment_stride: int = 22
    moment_columns: int = 23  # tiles in each row of tiles
    moment_tiles: int = 24
    partials: int = 25  # [2, moment_tiles]
    projects: int = 26  # whether the moment is z = y B
    normalize: int = 27
    first_response: int = 28  # the first tile of the problem in each launch
    first_moment: int = 29
    first_gradient: int = 30
    u_feedback: int = 31  # numbers, as float32: u = x (u_feedback B - u_weight W)'
    u_weight: int = 32
    u_scale: int = 33
    null: int = 34
    decay: int = 35
    self_: int = 36
    power: int = (
        37  # of the basis of orthogonal probes, or -1; and their draw, the first of them, the order of its rows
    )
    draw: int = 38
    start: int = 39
    factor: int = 40
    shift: int = 41
    paley: int = 42  # the offset of the rows of its other factor
    COLUMNS: int = 43


T = Columns()
FIRST = (T.first_response, T.first_moment, T.first_gradient)
OFFSETS = (T.u, T.y, T.moment, T.partials)  # in the workspace


class ProbeTile(NamedTuple):
    """Blocks: BR rows and BM probes of a response; BR rows and 128 columns of a gradient, BP probes per step; BS rows
    and columns of a moment. BI is the step of sums of products without signs."""

    BR: int
    BM: int
    BP: int
    BS: int
    BI: int
    W_PARTS: int  # bfloat16 numbers whose sum is a weight
    Y_PARTS: int  # and a response
    PRECISION: str
    SIGNS: Any  # the dtype of signs: the interpreter has no products of bfloat16
    stages: int


class Layer(NamedTuple):
    """A problem without its tensors."""

    weight: int  # address
    feedback: int
    shape: tuple[int, int, int]  # groups, rows of each, columns
    w_strides: tuple[int, int, int]
    b_strides: tuple[int, int, int]
    probes: int
    rule: Any
    index: int
    part: Any = None  # of a basis, if the probes are orthogonal
    order: tuple[int, int] = (1, 0)  # of its rows: a factor and a shift


class Plan(NamedTuple):
    """The table of a set of problems, and the sizes of the launches."""

    table: list[list[int]]
    paley: tuple[int, ...]  # behind the table: rows of Paley's matrices
    outputs: tuple[tuple[int, tuple, tuple], ...]  # offset, shape and strides of the gradient of each problem
    sparse: bool  # whether a response reads B
    tiles: tuple[int, int, int]  # of the three launches
    work: int  # elements of the workspace
    out: int  # and of all gradients


class Launch(NamedTuple):
    """One launch: the kernel, the number of programs, its constants and Triton's options."""

    kernel: Any
    programs: int
    constants: dict[str, Any]
    options: dict[str, Any]


def supports(weight: Tensor, feedback: Tensor, probes: int) -> bool:
    """Whether the kernels compute the gradient of these matrices [G, K, d]: 16-bit or float32, on a GPU."""
    on_gpu = weight.device.type == "cuda" or (_INTERPRETED and weight.device.type == "cpu")
    same = weight.dtype == feedback.dtype and weight.device == feedback.device
    if not (on_gpu and same and weight.dtype in NAMES and weight.numel()):
        return False
    if architecture(weight.device)[0] < OLDEST:
        return False
    groups, rows, inputs = weight.shape
    last = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in (weight, feedback)]
    sizes = (probes * padded(groups * rows), probes * padded(inputs), groups * rows * padded(rows), *last)
    return max(sizes) < MOST_ELEMENTS


def probe_gradients(problems, seed: int, step: int) -> list[Tensor]:
    """The gradient of each problem, [G, K, d] in the dtype of its feedback; see probes.py.

    Args:
        problems: named tuples with weight and feedback [G, K, d], probes, rule and layer_index. Those of one device
            and dtype share their launches.
        seed, step: with the index of a layer, they determine its signs.
    """
    together: dict[tuple, list[int]] = {}
    for i, problem in enumerate(problems):
        together.setdefault((problem.weight.device, problem.weight.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for (device, dtype), places in together.items():
        gradients = _launch([problems[i] for i in places], device, dtype, seed, step)
        found |= dict(zip(places, gradients, strict=True))
    return [found[i] for i in range(len(problems))]


def _launch(problems, device: torch.device, dtype: torch.dtype, seed: int, step: int) -> list[Tensor]:
    """The gradients of problems of one device and dtype."""
    layers = tuple(_layer(problem, seed) for problem in problems)
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    tile = choose_tile(NAMES[dtype], tf32, any(p.rule.sparse for p in problems), torch.version.hip is not None)
    numbers = {"seed_low": signed(seed), "seed_high": signed(seed >> 32), "step": signed(step)}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        plan, table = _table(layers, dtype.itemsize, tile, device, stream)
        work = torch.empty(plan.work, dtype=torch.float32, device=device)
        out = torch.empty(plan.out, dtype=dtype, device=device)
        for launch in launches(plan, tile):
            _start(launch, {"p_table": table, "p_work": work, "p_out": out}, numbers)
    start = out.storage_offset()
    return [out.as_strided(shape, strides, start + offset) for offset, shape, strides in plan.outputs]


_handles: dict[tuple, Handle | None] = {}  # by kernel, dtype, device and constants


def _start(launch: Launch, tensors: dict[str, Tensor], numbers: dict[str, int]) -> None:
    """Start a launch: through Triton's JIT at first, then by a handle of the compiled kernel.

    The kernel is compiled for the constants and the dtype of p_out. Addresses are always aligned: those of whole
    tensors. The JIT does not specialize it for the numbers.
    """
    key = (launch.kernel.__name__, tensors["p_out"].dtype, tensors["p_out"].device, *launch.constants.values())
    allowed, names = handles_allowed(), launch.kernel.arg_names
    handle = _handles.get(key) if allowed else None
    if handle is not None:
        values = {name: t.data_ptr() for name, t in tensors.items()} | numbers
        handle.start((launch.programs, 1, 1), tuple(map(values.get, names)))
        return
    arguments = tensors | {name: value for name, value in numbers.items() if name in names}
    compiled = launch.kernel[(launch.programs,)](**arguments, **launch.constants, **launch.options)
    if allowed:
        _handles[key] = make_handle(compiled)


def _layer(problem, seed: int) -> Layer:
    w, b, part = problem.weight, problem.feedback, problem.part
    count = problem.probes if part is None else part.stop - part.start
    order = (1, 0) if part is None else row_order(seed, problem.layer_index, part.draw)
    found = w.data_ptr(), b.data_ptr(), tuple(w.shape), w.stride(), b.stride(), count, problem.rule
    return Layer(*found, problem.layer_index, part, order)


@lru_cache(4096)  # the estimates of a sweep have one order
def row_order(seed: int, index: int, draw: int) -> tuple[int, int]:
    """A random odd factor and a shift below 2^16: i -> factor i + shift permutes the numbers below a power of two."""
    generator = random.Random(f"{seed} {index} {draw}")
    return 2 * generator.getrandbits(15) + 1, generator.getrandbits(16)


@lru_cache(maxsize=8)
def _table(
    layers: tuple[Layer, ...], itemsize: int, tile: ProbeTile, device: torch.device, stream: int
) -> tuple[Plan, Tensor]:
    """The plan of these layers, and its table on the device, which only this stream reads: it is copied there."""
    plan = make_plan(layers, itemsize, tile)
    numbers = array("q", itertools.chain(*plan.table, plan.paley))
    table = torch.frombuffer(numbers, dtype=torch.int64)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    return plan, table


def choose_tile(dtype: str, tf32: bool, sparse: bool, amd: bool = False) -> ProbeTile:
    """The tile for weights of this dtype; ``sparse`` if a response is that of a difference of weights."""
    wide = dtype == "float32"
    exact = 2 if tf32 else 3  # 16 bits are more than TF32 has
    parts = exact if wide else 2 if sparse or dtype == "float16" else 1
    precision = "ieee" if (wide and not tf32) or amd else "tf32"  # few AMD architectures have TF32
    signs = tl.float32 if _INTERPRETED else tl.bfloat16
    # With more probes, or longer steps of sums without signs, float32 spills on sm_80.
    probes, step = (64, 16) if wide else (128, 32)
    # Two stages of float32 exceed the 64 KB of shared memory of AMD processors, and two stages of two weights the 99 KB
    # of consumer GPUs.
    stages = 1 if amd or (wide and sparse) else 2
    return ProbeTile(64, probes, 16 if wide else 32, 64, step, parts, exact if wide else 2, precision, signs, stages)


def launches(plan: Plan, tile: ProbeTile) -> list[Launch]:
    """The launches of a plan; those without programs are left out."""
    constants = {"PROBLEMS": len(plan.table), "T": T, "TILE": tile}
    options = {"num_warps": 8, "num_stages": tile.stages, "enable_fp_fusion": True}
    response = constants | {"USE_FEEDBACK": plan.sparse}
    gradient = constants | {"HAS_NULL": plan.tiles[1] > 0}
    kernels = ((response_kernel, response), (moment_kernel, constants), (gradient_kernel, gradient))
    return [
        Launch(kernel, programs, values, options)
        for (kernel, values), programs in zip(kernels, plan.tiles, strict=True)
        if programs
    ]


def make_plan(layers: tuple[Layer, ...], itemsize: int, tile: ProbeTile) -> Plan:
    """The table and the sizes of the launches: a pure function.

    The problems with the longest sums come first, so that their programs do not end last.
    """
    order = sorted(range(len(layers)), key=lambda i: -(layers[i].probes + layers[i].shape[2]))
    bases = {layer.part.paley: 0 for layer in layers if layer.part}
    behind = T.COLUMNS << (len(layers) - 1).bit_length()  # the table has a power of two rows
    for paley in bases:
        bases[paley], behind = behind, behind + len(paley)
    table, first, work, out, outputs = [], (0, 0, 0), 0, 0, {}
    for place, i in enumerate(order):
        layer, part = layers[i], layers[i].part
        scale, power = (1.0, -1) if part is None else (part.scale, part.power)
        found = _template(*layer[2:6], layer.rule, scale, power, itemsize, tile)
        row = list(found.row)
        for column in OFFSETS:
            row[column] += work
        row[T.weight], row[T.feedback], row[T.index], row[T.out] = layer.weight, layer.feedback, layer.index, out
        row[T.aligned] = int(found.dense and (layer.weight | layer.feedback) % 16 == 0)
        row[T.first_response], row[T.first_moment], row[T.first_gradient] = first
        if part is not None:
            row[T.draw], row[T.start], (row[T.factor], row[T.shift]) = part.draw, part.start, layer.order
            row[T.paley] = bases[part.paley] - place * T.COLUMNS
        table.append(row)
        outputs[i] = out, layer.shape, found.strides
        first = first[0] + found.tiles[0], first[1] + found.tiles[1], first[2] + found.tiles[2]
        work, out = work + found.work, out + found.out
    rest = (1 << (len(layers) - 1).bit_length()) - len(layers)
    table += [[NEVER if column in FIRST else 0 for column in range(T.COLUMNS)]] * rest
    sparse = any(layer.rule.sparse for layer in layers)
    return Plan(
        table, tuple(itertools.chain(*bases)), tuple(outputs[i] for i in range(len(layers))), sparse, first, work, out
    )


class Template(NamedTuple):
    """The row of a layer whose parts of the workspace begin at 0, without addresses, its index and what is drawn."""

    row: tuple[int, ...]
    tiles: tuple[int, int, int]  # of the three launches
    work: int  # elements of the workspace
    out: int  # and of the gradient, which has these strides
    strides: tuple[int, int, int]
    dense: bool  # whether every row of the weights and of the gradient begins at a multiple of 16 bytes if they do


@lru_cache(4096)
def _template(
    shape: tuple[int, int, int], w_strides: tuple[int, int, int], b_strides: tuple[int, int, int], probes: int,
    rule: Any, scale: float, power: int, itemsize: int, tile: ProbeTile,
) -> Template:  # fmt: skip
    """What a row of the table has in every estimate with this number of probes.

    Args:
        scale, power: of orthogonal probes; 1 and -1 if they are independent.
    """
    (groups, k, d), m = shape, probes
    rows = groups * k
    weight = scale**2 / m  # of a probe
    reads, both = bool(rule.amp or rule.sparse), bool(rule.sparse and rule.null)
    projects = bool(rule.null) and groups == 1 and projection_is_cheaper(m, k, d)
    response = ceil(m, tile.BM) * ceil(rows, tile.BR)
    moment_columns = ceil(d if projects else widest_span(rows, k, tile.BS), tile.BS)
    moment_tiles = ceil(m if projects else rows, tile.BS) * moment_columns if rule.null else 0
    y_stride, moment_stride = padded(rows), padded(d if projects else k)
    sizes = [padded(m * y_stride), padded(m * y_stride) if both else 0]
    sizes += [(m if projects else rows) * moment_stride if rule.null else 0, padded(2 * moment_tiles)]
    u, y, moment, partials = (sum(sizes[:i]) for i in range(4))
    transposed = d > 1 and b_strides == (k * d, 1, k)  # then the gradient is, too; otherwise it has no gaps
    strides = b_strides if transposed else (k * d, d, 1)
    values = {
        "probes": m, "rows": rows, "group_rows": k, "inputs": d, "u": u, "y": y if both else u, "y_stride": y_stride,
        "moment": moment, "moment_stride": moment_stride, "moment_columns": moment_columns,
        "moment_tiles": moment_tiles, "partials": partials, "projects": projects, "normalize": rule.normalize,
        "u_feedback": bits(rule.sparse), "u_weight": bits(rule.amp if rule.sparse else -1.0),
        "u_scale": bits((1.0 if rule.sparse else -rule.amp) * weight),
        "null": bits(rule.null if rule.normalize else rule.null * weight),
        "decay": bits(rule.decay), "self_": bits(rule.self_), "power": power, "factor": 1,
    }  # fmt: skip
    row = [0] * T.COLUMNS
    for name, value in values.items():
        row[getattr(T, name)] = int(value)
    for start, three in ((T.w_strides, w_strides), (T.b_strides, b_strides), (T.o_strides, strides)):
        row[start : start + 3] = three
    tiles = (response * (1 + both) if reads or rule.null else 0, moment_tiles, ceil(rows, tile.BR) * ceil(d, 128))
    dense = is_dense((w_strides, b_strides, strides), d, 16 // itemsize)
    return Template(tuple(row), tiles, sum(sizes), padded(rows * d), strides, dense)


def projection_is_cheaper(probes: int, rows: int, inputs: int) -> bool:
    """Whether z = y B and y'z cost less than y'y, B B' (half of each, as they are symmetric) and y'y B."""
    return 4 * probes * inputs < rows * (probes + 3 * inputs)


def widest_span(rows: int, group_rows: int, block: int) -> int:
    """The most rows of the groups that a block of rows overlaps."""
    spans = [
        min((last // group_rows + 1) * group_rows, rows) - first // group_rows * group_rows
        for first in range(0, rows, block)
        for last in [min(first + block, rows) - 1]
    ]
    return max(spans)


def is_dense(all_strides: Sequence[tuple[int, int, int]], columns: int, vector: int) -> bool:
    """Whether all rows have no gaps and begin at multiples of ``vector`` elements from the first, and end at one."""
    dense = all(s[2] == 1 and s[0] % vector == 0 and s[1] % vector == 0 for s in all_strides)
    return dense and columns % vector == 0


def padded(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return ceil(size, ALIGNMENT) * ALIGNMENT


def ceil(size: int, block: int) -> int:
    """The number of blocks that cover a size."""
    return -(-size // block)


def bits(number: float) -> int:
    """The bits of a float32."""
    return struct.unpack("<i", struct.pack("<f", number))[0]


def signed(number: int) -> int:
    """The lower 32 bits of a number, as a signed one: an argument of the same type for every value."""
    return (number + 2**31) % 2**32 - 2**31
