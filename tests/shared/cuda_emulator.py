"""The CUDA kernels on the CPU: csrc/cuda compiled by the C++ compiler against csrc/cuda_emulator.

The functions have the names of the ops and take CPU tensors. A launch whose behavior CUDA leaves undefined raises
RuntimeError where the emulator detects it. A misaligned access ends the process.
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

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
FLAGS = (
    "-std=c++17 -O1 -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas -fsanitize=undefined -fno-sanitize-recover=all "
    "-U_FORTIFY_SOURCE"  # it mistakes a jump to another fiber for a jump out of the stack
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ORDERS = ["forward", "backward", "shuffled"]
MAX_DIMS = 8


def build(folder: Path, sources: list[Path]) -> ctypes.CDLL:
    """Compile the sources and the emulator to one library in `folder`."""
    sources = [*sources, CSRC / "cuda_emulator" / "grid.cpp"]
    command = [COMPILER, *FLAGS.split(), "-I", str(CSRC / "cuda_emulator"), "-x", "c++"]
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    library = str(folder / "cuda_emulator.so")
    with ThreadPoolExecutor(2) as pool:
        jobs = [[*command, "-c", str(source), "-o", o] for source, o in zip(sources, objects, strict=True)]
        list(pool.map(partial(subprocess.run, check=True), jobs))
    subprocess.run([COMPILER, "-shared", "-fsanitize=undefined", *objects, "-o", library], check=True)
    return ctypes.CDLL(library)


@cache
def _built() -> ctypes.CDLL | subprocess.CalledProcessError:
    """The library, or the error of its build; built once."""
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda_emulator" / "exports.cpp"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = build(Path(folder), sources)
        except subprocess.CalledProcessError as error:
            return error
    library.emulated_error.restype = ctypes.c_char_p
    return library


def _library() -> ctypes.CDLL:
    if isinstance(_built(), Exception):
        raise RuntimeError("the CUDA sources do not compile for the host") from _built()
    return _built()


def _check(error: int) -> None:
    message = _library().emulated_error(error)
    if message is not None:
        raise RuntimeError(message.decode())


@contextmanager
def order(name: str):
    """Inside, blocks and threads run in this one of ORDERS."""
    _library().emulated_set_order(ORDERS.index(name))
    try:
        yield
    finally:
        _library().emulated_set_order(0)


class FeedbackRow(ctypes.Structure):
    """As csrc/step.h."""

    _fields_ = (
        ("operand", ctypes.c_void_p * 4),
        ("numel", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("decay", "self", "tie")),
        ("index", ctypes.c_uint32),
        ("dtype", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("with_previous", ctypes.c_bool),
    )


class FeedbackOptions(ctypes.Structure):
    """As csrc/step.h."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "momentum", "noise")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_bool) for name in ("nesterov", "skip_nonfinite")),
        ("dynamic", ctypes.c_void_p),
    )


class AlignmentPair(ctypes.Structure):
    """As csrc/alignment.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("feedback", "weight")),
        ("numel", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("index", "layout", "dtype")),
    )


class CenterOperands(ctypes.Structure):
    """As csrc/center.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "output")),
        *((name, ctypes.c_int64) for name in ("samples", "positions", "stride")),
        ("dtype", ctypes.c_int32),
    )


class FeatureMap(ctypes.Structure):
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
        *((name, FeatureMap) for name in ("input", "grad_output", "grad_input", "mean", "response", "response_mean")),
        *((name, ctypes.c_void_p) for name in ("weight", "feedback", "grad_weight", "grad_feedback", "grad_bias")),
        *((name, ctypes.c_double) for name in ("decay", "amp", "null", "sparse", "self", "tie")),
    )


def layout_of(operands: int) -> type[ctypes.Structure]:
    """Layout<operands> of csrc/layout.h."""
    sizes = ctypes.c_int64 * MAX_DIMS
    fields = (("dims", ctypes.c_int64), ("size", sizes), ("stride", sizes * operands))
    return type("Layout", (ctypes.Structure,), {"_fields_": fields})


def _layouts(operands: list[list], by_element: bool, together: list[bool]) -> tuple[list[int], ctypes.Array]:
    """The index of the layout of each row, or -1 if element i of every operand is at offset i, and the layouts.

    Of rows that share memory, ``together`` with the row before, either all have a layout or none.
    """
    groups: list[list[list]] = []
    for row, with_previous in zip(operands, together, strict=True):
        groups[-1].append(row) if with_previous else groups.append([row])
    Layout = layout_of(len(operands[0]) if operands else 1)
    indices, layouts = [], []
    for group in groups:
        dense = all(map(_alike, group)) and (group[0][0].is_contiguous() or not by_element)
        for row in group:
            indices.append(-1 if dense else len(layouts))
            if not dense:
                layouts.append(Layout(dims=row[0].dim(), size=tuple(row[0].shape)))
                for k, tensor in enumerate(row):
                    layouts[-1].stride[k] = () if tensor is None else tuple(tensor.stride())
    return indices, (Layout * len(layouts))(*layouts)


def _alike(row: list) -> bool:
    there = [tensor for tensor in row if tensor is not None]
    return all(tensor.stride() == there[0].stride() and _is_dense(tensor) for tensor in there)


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).is_contiguous()


def _goes_with(before: list | None, row: list) -> bool:
    """As StepPlanner of csrc/checks/step.cpp, for tensors that share all of their memory or none."""
    if before is None:
        return False
    pointers = [_pointer(t) for t in row]
    return _pointer(before[1]) in (pointers[0], pointers[1] or 0) or _pointer(before[2]) == (pointers[2] or 0)


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def extension_feedback_step_(
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
    indices, layouts = _layouts(operands, noise != 0, together)
    rows = [
        FeedbackRow(
            tuple(map(_pointer, row)), row[0].numel(), decay[i], self_[i], tie[i], i, DTYPES.index(row[0].dtype),
            layout, with_previous,
        )
        for i, row, layout, with_previous in zip(here, operands, indices, together, strict=True)
    ]  # fmt: skip
    options = FeedbackOptions(lr, momentum, noise, seed % 2**64, nesterov, skip_nonfinite, _pointer(dynamic))
    flag = ctypes.byref(ctypes.c_int(0)) if skip_nonfinite else None
    table = (FeedbackRow * len(rows))(*rows)
    _check(_library().emulated_step(table, len(rows), layouts, len(layouts), ctypes.byref(options), flag))


def extension_alignment_products(feedback, weight):
    """The kernel of the op of this name."""
    here = [i for i, tensor in enumerate(feedback) if tensor.numel()]
    operands = [[feedback[i], weight[i]] for i in here]
    indices, layouts = _layouts(operands, False, [False] * len(operands))
    rows = [
        AlignmentPair(*map(_pointer, row), row[0].numel(), i, layout, DTYPES.index(row[0].dtype))
        for i, row, layout in zip(here, operands, indices, strict=True)
    ]
    table = (AlignmentPair * len(rows))(*rows)
    by_block = torch.full(
        (_library().emulated_alignment_blocks(table, len(rows)), 3), float("nan"), dtype=torch.float64
    )
    arrived = torch.zeros(len(feedback), dtype=torch.int32)
    products = torch.zeros(len(feedback), 3, dtype=torch.float64)
    outputs = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (by_block, arrived, products)]
    _check(_library().emulated_alignment(table, len(rows), layouts, len(layouts), *outputs))
    return products


def extension_center(input: torch.Tensor, samples: int) -> torch.Tensor:
    """The kernel of the op of this name."""
    output = torch.empty_strided(
        (samples, *input.shape[1:]), (input[:1].numel(), *input.stride()[1:]), dtype=input.dtype
    )
    if output.numel():
        _check(_library().emulated_center(ctypes.byref(_center_operands(input, output))))
    return output


def extension_add_centered_(self: torch.Tensor, input: torch.Tensor, beta: float, alpha: float) -> None:
    """The kernel of the op of this name."""
    if input.numel():
        operands = ctypes.byref(_center_operands(input, self))
        _check(_library().emulated_add_centered(operands, ctypes.c_double(beta), ctypes.c_double(alpha)))


def _center_operands(input: torch.Tensor, output: torch.Tensor) -> CenterOperands:
    samples, positions = output.shape[0], output[0].numel()
    return CenterOperands(
        _pointer(input), _pointer(output), samples, positions, input.stride(0), DTYPES.index(input.dtype)
    )


def extension_depthwise_backward(
    grad_output, input, weight, feedback, mean, response, response_mean, stride, padding, dilation, groups,
    coefficients, samples, *mask,
):  # fmt: skip
    """The kernels of the op of this name."""
    like = (input, weight, weight, weight[:, 0, 0, 0].contiguous())
    grads = [torch.full_like(t, float("nan")) if needed else None for t, needed in zip(like, mask, strict=True)]
    (n, _, *size), (k, per_group, *kernel) = input.shape, weight.shape
    sizes = (n, groups, per_group, k // groups, *size, *grad_output.shape[2:], *kernel)
    maps = (input, grad_output, grads[0], mean, response, response_mean)
    maps = [FeatureMap() if t is None else FeatureMap(_pointer(t), *t.stride()) for t in maps]
    pointers = map(_pointer, (weight, feedback, *grads[1:]))
    layer = DepthwiseLayer(
        *sizes, tuple(stride), tuple(padding), tuple(dilation), samples, DTYPES.index(input.dtype), *maps, *pointers,
        *(coefficients if mask[2] else [0.0] * 6),
    )  # fmt: skip
    _library().emulated_depthwise_partial.restype = ctypes.c_int64
    partial = torch.full(
        (_library().emulated_depthwise_partial(ctypes.byref(layer)),), float("nan"), dtype=torch.float64
    )
    _check(_library().emulated_depthwise(ctypes.byref(layer), ctypes.c_void_p(partial.data_ptr())))
    return grads
