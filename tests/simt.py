"""The CUDA kernels on the CPU: csrc/cuda compiled by the C++ compiler against csrc/simt, under the names of the ops.

Tensors are CPU tensors; a launch that CUDA would leave undefined, as far as the shim sees it, raises RuntimeError, and
a misaligned access ends the process.
"""

import ctypes
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch

CSRC = Path(__file__).parents[1] / "csrc"
COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
FLAGS = (
    "-std=c++17 -O1 -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas -fsanitize=undefined -fno-sanitize-recover=all "
    "-U_FORTIFY_SOURCE"  # which takes a jump to another fiber for a jump out of the stack
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ORDERS = ["forward", "backward", "shuffled"]
MAX_DIMS = 8


def build(folder: Path, sources: list[Path]) -> ctypes.CDLL:
    """The sources and the shim as one library in `folder`."""
    sources = [*sources, CSRC / "simt" / "grid.cpp"]
    command = [COMPILER, *FLAGS.split(), "-I", str(CSRC / "simt"), "-x", "c++"]
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    library = str(folder / "simt.so")
    with ThreadPoolExecutor(2) as pool:
        jobs = [[*command, "-c", str(source), "-o", o] for source, o in zip(sources, objects, strict=True)]
        list(pool.map(partial(subprocess.run, check=True), jobs))
    subprocess.run([COMPILER, "-shared", "-fsanitize=undefined", *objects, "-o", library], check=True)
    return ctypes.CDLL(library)


@cache
def _built() -> ctypes.CDLL | subprocess.CalledProcessError:
    """Once, also where it fails."""
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "simt" / "exports.cpp"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = build(Path(folder), sources)
        except subprocess.CalledProcessError as error:
            return error
    library.simt_error.restype = ctypes.c_char_p
    return library


def _library() -> ctypes.CDLL:
    if isinstance(_built(), Exception):
        raise RuntimeError("the CUDA sources do not compile for the host") from _built()
    return _built()


def _check(error: int) -> None:
    message = _library().simt_error(error)
    if message is not None:
        raise RuntimeError(message.decode())


@contextmanager
def order(name: str):
    """Inside, blocks and threads take their turn in this one of ORDERS."""
    _library().simt_set_order(ORDERS.index(name))
    try:
        yield
    finally:
        _library().simt_set_order(0)


class StepTensor(ctypes.Structure):
    """As csrc/feedback_step.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("feedback", "weight", "grad", "momentum")),
        ("numel", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("decay", "self", "tie")),
        ("index", ctypes.c_uint32),
        ("dtype", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        *((name, ctypes.c_bool) for name in ("has_weight", "has_grad", "has_momentum", "with_previous")),
    )


class StepOptions(ctypes.Structure):
    """As csrc/feedback_step.h."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "momentum", "noise")),
        ("seed", ctypes.c_uint64),
        ("nesterov", ctypes.c_bool),
        ("dynamic", ctypes.c_void_p),
    )


class AlignmentPair(ctypes.Structure):
    """As csrc/alignment.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("feedback", "weight")),
        ("numel", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("index", "layout", "dtype")),
    )


class Center(ctypes.Structure):
    """CenterLaunch of csrc/cuda/launch.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "output")),
        *((name, ctypes.c_int64) for name in ("samples", "positions", "stride")),
        ("dtype", ctypes.c_int32),
    )


class Map(ctypes.Structure):
    """As csrc/depthwise.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sample", "channel", "row", "column")),
    )


class DepthwiseLayer(ctypes.Structure):
    """As csrc/depthwise.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "NGIJHWPQRS"),
        *((name, ctypes.c_int64 * 2) for name in ("stride", "padding", "dilation")),
        ("samples", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        *((name, Map) for name in ("input", "mean", "grad_output", "grad_input", "response", "response_mean")),
        *((name, ctypes.c_void_p) for name in ("weight", "feedback", "grad_weight", "grad_feedback", "grad_bias")),
        *((name, ctypes.c_double) for name in ("decay", "amp", "null", "sparse", "self", "tie")),
    )


def layout_of(operands: int) -> type[ctypes.Structure]:
    """Layout<operands> of csrc/layout.h."""
    sizes = ctypes.c_int64 * MAX_DIMS
    fields = (("dims", ctypes.c_int64), ("size", sizes), ("stride", sizes * operands))
    return type("Layout", (ctypes.Structure,), {"_fields_": fields})


def _layouts(operands: list[list], by_element: bool, together: list[bool]) -> tuple[list[int], ctypes.Array]:
    """Of each row its place in the list of layouts, or -1 where element i of every operand is at i; and that list.

    Rows that are together with the one before all have one or all have none.
    """
    groups: list[list[list]] = []
    for row, with_previous in zip(operands, together, strict=True):
        groups[-1].append(row) if with_previous else groups.append([row])
    Layout = layout_of(len(operands[0]) if operands else 1)
    places, layouts = [], []
    for group in groups:
        dense = all(map(_alike, group)) and (group[0][0].is_contiguous() or not by_element)
        for row in group:
            places.append(-1 if dense else len(layouts))
            if not dense:
                layouts.append(Layout(dims=row[0].dim(), size=tuple(row[0].shape)))
                for k, tensor in enumerate(row):
                    layouts[-1].stride[k] = () if tensor is None else tuple(tensor.stride())
    return places, (Layout * len(layouts))(*layouts)


def _alike(row: list) -> bool:
    there = [tensor for tensor in row if tensor is not None]
    return all(tensor.stride() == there[0].stride() and _is_dense(tensor) for tensor in there)


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).is_contiguous()


def _goes_with(before: list | None, row: list) -> bool:
    """As plan_step of csrc/arguments.cpp, of tensors that share all of their memory or none."""
    if before is None:
        return False
    places = [_pointer(t) for t in row]
    return _pointer(before[1]) in (places[0], places[1] or 0) or _pointer(before[2]) == (places[2] or 0)


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def native_feedback_step_(
    feedback, weight, grad, momentum_buffer, *, decay, self_, tie, lr, momentum=0.0, nesterov=False, noise=0.0, seed=0,
    skip_nonfinite=False, dynamic=None,
):  # fmt: skip
    """The kernels of the op of this name."""
    here = [i for i, tensor in enumerate(feedback) if tensor.numel()]
    operands = [
        [
            feedback[i],
            weight[i] if self_[i] else None,
            grad[i] if tie[i] else None,
            momentum_buffer[i] if momentum else None,
        ]
        for i in here
    ]
    together = [_goes_with(before, row) for before, row in zip([None, *operands], operands, strict=False)]
    places, layouts = _layouts(operands, noise != 0, together)
    rows = [
        StepTensor(
            *map(_pointer, row), row[0].numel(), decay[i], self_[i], tie[i], i, DTYPES.index(row[0].dtype), place,
            *(tensor is not None for tensor in row[1:]), with_previous,
        )
        for i, row, place, with_previous in zip(here, operands, places, together, strict=True)
    ]  # fmt: skip
    options = StepOptions(lr, momentum, noise, seed % 2**64, nesterov, _pointer(dynamic))
    flag = ctypes.byref(ctypes.c_int(0)) if skip_nonfinite else None
    table = (StepTensor * len(rows))(*rows)
    _check(_library().simt_step(table, len(rows), layouts, len(layouts), ctypes.byref(options), flag))


def native_alignment_products(feedback, weight):
    """The kernel of the op of this name."""
    here = [i for i, tensor in enumerate(feedback) if tensor.numel()]
    operands = [[feedback[i], weight[i]] for i in here]
    places, layouts = _layouts(operands, False, [False] * len(operands))
    rows = [
        AlignmentPair(*map(_pointer, row), row[0].numel(), i, place, DTYPES.index(row[0].dtype))
        for i, row, place in zip(here, operands, places, strict=True)
    ]
    table = (AlignmentPair * len(rows))(*rows)
    by_block = torch.full((_library().simt_alignment_blocks(table, len(rows)), 3), float("nan"), dtype=torch.float64)
    arrived = torch.zeros(len(feedback), dtype=torch.int32)
    products = torch.zeros(len(feedback), 3, dtype=torch.float64)
    outputs = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (by_block, arrived, products)]
    _check(_library().simt_alignment(table, len(rows), layouts, len(layouts), *outputs))
    return products


def native_center(input: torch.Tensor, samples: int) -> torch.Tensor:
    """The kernel of the op of this name."""
    output = torch.empty_strided(
        (samples, *input.shape[1:]), (input[:1].numel(), *input.stride()[1:]), dtype=input.dtype
    )
    if output.numel():
        positions = output[0].numel()
        launch = Center(
            _pointer(input), _pointer(output), samples, positions, input.stride(0), DTYPES.index(input.dtype)
        )
        _check(_library().simt_center(ctypes.byref(launch)))
    return output


def native_add_centered_(self: torch.Tensor, input: torch.Tensor, beta: float, alpha: float) -> None:
    """The kernel of the op of this name."""
    if input.numel():
        samples, positions = input.shape[0], input[0].numel()
        launch = Center(_pointer(input), _pointer(self), samples, positions, input.stride(0), DTYPES.index(input.dtype))
        _check(_library().simt_add_centered(ctypes.byref(launch), ctypes.c_double(beta), ctypes.c_double(alpha)))


def native_depthwise_backward(
    grad_output, input, weight, feedback, mean, response, response_mean, stride, padding, dilation, groups,
    coefficients, samples, *mask,
):  # fmt: skip
    """The kernels of the op of this name."""
    like = (input, weight, weight, weight[:, 0, 0, 0].contiguous())
    grads = [torch.full_like(t, float("nan")) if needed else None for t, needed in zip(like, mask, strict=True)]
    (n, _, *size), (k, per_group, *kernel) = input.shape, weight.shape
    sizes = (n, groups, per_group, k // groups, *size, *grad_output.shape[2:], *kernel)
    maps = (input, mean, grad_output, grads[0], response, response_mean)
    maps = [Map() if t is None else Map(_pointer(t), *t.stride()) for t in maps]
    pointers = map(_pointer, (weight, feedback, *grads[1:]))
    layer = DepthwiseLayer(
        *sizes, tuple(stride), tuple(padding), tuple(dilation), samples, DTYPES.index(input.dtype), *maps, *pointers,
        *(coefficients if mask[2] else [0.0] * 6),
    )  # fmt: skip
    _library().simt_depthwise_partial.restype = ctypes.c_int64
    partial = torch.full((_library().simt_depthwise_partial(ctypes.byref(layer)),), float("nan"), dtype=torch.float64)
    _check(_library().simt_depthwise(ctypes.byref(layer), ctypes.c_void_p(partial.data_ptr())))
    return grads
