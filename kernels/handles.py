"""Runs the launches of a plan: through Triton's JIT at first, then by handles of the compiled kernels.

The JIT binds, specializes and hashes all arguments of each launch, most of them constants. A handle keeps what the JIT
found for the first launch, and only takes the addresses of the tensors and the values of the named numbers.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from .launch import Launch, check, needs, start, workspace

# The operands that hold what the caller passes. All others are allocated for the sizes of the plan.
ACTIVATIONS = ("x", "x_used", "dy", "y", "u")
ALIGNMENT = 16  # bytes: the only property of an address for which Triton specializes a kernel on NVIDIA GPUs
# The versions of Triton whose launchers take the arguments that a handle passes. After 3.6, a launcher takes those of
# the kernel as one tuple.
OLDEST, NEWEST = (3, 6), (3, 9)
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
PACKED = VERSION > OLDEST


class Handle(NamedTuple):
    """A compiled kernel, and how the arguments of its launch are taken from those of all launches."""

    launch: Callable[..., None]  # Triton's launcher, in C
    grid: tuple[int, int, int]
    options: tuple[Any, ...]  # its arguments between the stream and those of the kernel
    tuples: tuple[itemgetter, ...]  # the first arguments of the kernel, which are tuples
    arguments: itemgetter  # all others, by position


class Bound(NamedTuple):
    """The handles of all launches of a plan, and what they were compiled for."""

    handles: tuple[Handle, ...]
    tensors: itemgetter  # of the named values: the activations, then the others
    dtypes: list[torch.dtype]  # of the tensors
    shapes: list[tuple[int, ...]]  # of the activations, which must be contiguous
    numbers: itemgetter  # of the named values
    constants: tuple[Any, ...]
    stream: Callable[[int], int]  # the current stream of a device
    device: int

    def run(self, values: dict[str, Any]) -> bool:
        """Start the launches; False, before any, if the tensors differ from those the kernels were compiled for."""
        tensors = self.tensors(values)
        activations = tensors[: len(self.shapes)]
        addresses = tuple(map(Tensor.data_ptr, tensors))
        if (
            reduce(or_, addresses) % ALIGNMENT
            or [t.dtype for t in tensors] != self.dtypes
            or [t.shape for t in activations] != self.shapes
            or not all(map(Tensor.is_contiguous, activations))
        ):
            return False
        named = addresses + self.numbers(values) + self.constants
        stream = self.stream(self.device)
        for launch, grid, options, tuples, arguments in self.handles:
            kernel_arguments = arguments(named)
            if tuples:
                kernel_arguments = (*[elements(named) for elements in tuples], *kernel_arguments)
            if PACKED:
                launch(*grid, stream, *options, kernel_arguments)
            else:
                launch(*grid, stream, *options, *kernel_arguments)
        return True


class Launcher:
    """Runs launches on one device, one after another."""

    def __init__(self, launches: Sequence[Launch], device: torch.device) -> None:
        self.launches = launches
        self.device = device
        self.needs = needs(launches)
        self.bound: Bound | None = None

    def run(self, values: dict[str, Any]) -> None:
        """Run the launches with the tensors and numbers in ``values``; the device must be the current device.

        Raises:
            ValueError: an operand does not have the shape, dtype and layout that the kernels read.
        """
        values |= workspace(self.needs, self.device)
        allowed = handles_allowed()
        if allowed and self.bound is not None and self.bound.run(values):
            return
        check(self.needs, values)
        compiled = [start(launch, values) for launch in self.launches]
        if allowed and self.bound is None:
            self.bound = bind(self.launches, compiled, values)


def handles_allowed() -> bool:
    """Whether a launch by a handle does what one by the JIT does: no hook is called, and nothing is instrumented."""
    if not OLDEST <= VERSION <= NEWEST:
        return False
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if getattr(hook, "calls", hook):  # a chain of hooks, or a function that has replaced it
            return False
    instrumented = triton.knobs.compilation.instrumentation_mode
    return not (runtime.debug or runtime.add_stages_inspection_hook or instrumented)


def bind(launches: Sequence[Launch], compiled: Sequence[Any], values: dict[str, Any]) -> Bound | None:
    """The handles of launches that the JIT has started; None if the next call may need other kernels.

    Args:
        compiled: what the JIT returned for each launch with these values.
    """
    if not launches or not all(isinstance(kernel, CompiledKernel) for kernel in compiled):
        return None  # the interpreter compiles nothing
    active = triton.runtime.driver.active
    if active.get_current_target().backend != "cuda":  # AMD's compiler specializes for the sizes of tensors too
        return None
    if any(kernel.metadata.global_scratch_size or kernel.metadata.profile_scratch_size for kernel in compiled):
        return None
    shapes = {n: shape for n, (shape, _) in needs(launches).operands.items() if n in ACTIVATIONS}
    names = {name for launch in launches for value in launch.arguments.values() for name in names_in(value)}
    tensors = [*shapes, *sorted(name for name in names - shapes.keys() if isinstance(values[name], Tensor))]
    numbers = sorted(names - set(tensors))
    # The JIT compiles for the value of an int, and for addresses that are aligned.
    if any(type(values[name]) is not float for name in numbers):
        return None
    if any(values[name].data_ptr() % ALIGNMENT for name in tensors):
        return None
    places: dict[Any, int] = {name: place for place, name in enumerate([*tensors, *numbers])}
    constants: list[Any] = []

    def place(value: Any) -> int:
        if isinstance(value, str):
            return places[value]
        constants.append(value)
        return len(places) + len(constants) - 1

    handles = []
    for launch, kernel in zip(launches, compiled, strict=True):
        # Constants are part of the code, and what is passed for them is not read.
        arguments = [launch.arguments.get(parameter) for parameter in launch.kernel.arg_names]
        tuples = [itemgetter(*map(place, value)) for value in arguments if isinstance(value, tuple)]
        rest = itemgetter(*map(place, arguments[len(tuples) :]))
        options = launcher_options(kernel)
        handles.append(Handle(kernel.run.launch, (*launch.grid, 1, 1)[:3], options, tuple(tuples), rest))
    dtypes = [values[name].dtype for name in tensors]
    return Bound(
        tuple(handles), getter(tensors), dtypes, list(shapes.values()), getter(numbers),
        tuple(constants), active.get_current_stream, active.get_current_device(),
    )  # fmt: skip


def launcher_options(kernel: CompiledKernel) -> tuple[Any, ...]:
    """The arguments of Triton's launcher between the stream and those of the kernel: no hooks, no scratch memory."""
    launcher, hooks, scratch = kernel.run, (None, None, None), (None, None)
    first = kernel.function, launcher.launch_cooperative_grid, launcher.launch_pdl
    if PACKED:
        return (*first, kernel.packed_metadata, *hooks, *scratch, launcher.arg_annotations, launcher.kernel_signature)
    return (*first, *scratch, kernel.packed_metadata, *hooks)


def names_in(value: Any) -> tuple[str, ...]:
    """The names of tensors and numbers in an argument of a launch."""
    return tuple(v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, str))


def getter(names: Sequence[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """A function that returns the values of these names, as a tuple of any length."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda values: tuple(values[name] for name in names)
