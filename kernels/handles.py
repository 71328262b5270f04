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

from .launch import Launch, check, in_order, needs, start, workspace

Getter = Callable[[dict[str, Any]], tuple[Any, ...]]

# The tensors whose addresses and dtypes the caller determines; dW and f have the dtype of its weight. The others are
# allocated for the plan. Shapes and layouts need no check in each call: the plan's key has the shapes of input and
# weight, autograd compares that of grad_output with the output's, and the blocks that are made of them are contiguous.
GIVEN = ("x", "x_used", "dy", "y", "u", "B", "weight", "feedback", "dW", "f")
ALIGNMENT = 16  # bytes: the only property of an address for which Triton specializes a kernel on NVIDIA GPUs
# The versions of Triton whose launchers take the arguments that a handle passes. After 3.6, a launcher takes those of
# the kernel as one tuple.
OLDEST, NEWEST = (3, 6), (3, 9)
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
PACKED = VERSION > OLDEST
RUNTIME = triton.knobs.runtime


class Handle(NamedTuple):
    """A compiled kernel that is launched without Triton's JIT."""

    launch: Callable[..., None]  # Triton's launcher, in C
    options: tuple[Any, ...]  # its arguments between the stream and those of the kernel

    def start(self, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        """Launch on the current stream of the current device.

        Args:
            arguments: addresses and numbers for all parameters of the kernel; what is passed for a constant is not
                read. An address must be aligned if that of the JIT's launch was.
        """
        active = triton.runtime.driver.active
        stream = active.get_current_stream(active.get_current_device())
        if PACKED:
            self.launch(*grid, stream, *self.options, arguments)
        else:
            self.launch(*grid, stream, *self.options, *arguments)


class Start(NamedTuple):
    """One launch of a plan: a handle, and how its arguments are taken from those of all launches."""

    handle: Handle
    grid: tuple[int, int, int]
    tuples: tuple[itemgetter, ...]  # the first arguments of the kernel, which are tuples
    arguments: itemgetter  # all others, by position


class Bound(NamedTuple):
    """The handles of all launches of a plan, and what they were compiled for."""

    starts: list[Start]
    tensors: Getter  # of the named values: those of GIVEN, then the others
    dtypes: list[torch.dtype]  # of those of GIVEN
    numbers: Getter  # of the named values
    constants: tuple[Any, ...]
    stream: Callable[[int], int]  # the current stream of a device
    device: int

    def run(self, values: dict[str, Any]) -> bool:
        """Start the launches; False, before any, if the tensors differ from those the kernels were compiled for."""
        tensors = self.tensors(values)
        given = tensors[: len(self.dtypes)]
        addresses = [t.data_ptr() for t in tensors]
        if reduce(or_, addresses[: len(given)]) % ALIGNMENT or [t.dtype for t in given] != self.dtypes:
            return False
        named = (*addresses, *self.numbers(values), *self.constants)
        stream = self.stream(self.device)
        for (launch, options), grid, tuples, arguments in self.starts:
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
        self.launches = in_order(launches)
        self.device = device
        self.needs = needs(launches)
        self.bound: Bound | None = None

    def run(self, values: dict[str, Any]) -> None:
        """Run the launches with the tensors and numbers in ``values``; the device must be the current device.

        Raises:
            ValueError: in a call by the JIT, an operand does not have the shape, dtype and layout that the kernels
                read.
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
    enter, leave = RUNTIME.launch_enter_hook, RUNTIME.launch_exit_hook  # chains of hooks, or functions instead
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return False
    return not (RUNTIME.debug or RUNTIME.add_stages_inspection_hook or triton.knobs.compilation.instrumentation_mode)


def make_handle(compiled: Any) -> Handle | None:
    """The handle of what the JIT returned for a launch; None if the next launch may need another kernel."""
    if not (isinstance(compiled, CompiledKernel) and OLDEST <= VERSION <= NEWEST):
        return None  # the interpreter compiles nothing
    if triton.runtime.driver.active.get_current_target().backend != "cuda":
        return None  # AMD's compiler specializes for the sizes of tensors too
    if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        return None
    launcher, hooks, scratch = compiled.run, (None, None, None), (None, None)
    options = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    if PACKED:
        options = (*options, compiled.packed_metadata, *hooks, *scratch)
        return Handle(launcher.launch, (*options, launcher.arg_annotations, launcher.kernel_signature))
    return Handle(launcher.launch, (*options, *scratch, compiled.packed_metadata, *hooks))


def bind(launches: Sequence[Launch], compiled: Sequence[Any], values: dict[str, Any]) -> Bound | None:
    """The handles of launches that the JIT has started; None if the next call may need other kernels.

    Args:
        compiled: what the JIT returned for each launch with these values.
    """
    handles = [handle for kernel in compiled if (handle := make_handle(kernel))]
    if not launches or len(handles) < len(launches):
        return None
    names = {name for launch in launches for value in launch.arguments.values() for name in names_in(value)}
    given = [name for name in GIVEN if name in names]
    others = sorted(name for name in names - set(given) if isinstance(values[name], Tensor))
    tensors = [*given, *others]
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

    starts = []
    for launch, handle in zip(launches, handles, strict=True):
        arguments = [launch.arguments.get(parameter) for parameter in launch.kernel.arg_names]
        tuples = [itemgetter(*map(place, value)) for value in arguments if isinstance(value, tuple)]
        rest = itemgetter(*map(place, arguments[len(tuples) :]))
        starts.append(Start(handle, (*launch.grid, 1, 1)[:3], tuple(tuples), rest))
    active = triton.runtime.driver.active
    return Bound(
        starts, getter([*given, *others]), [values[name].dtype for name in given], getter(numbers), tuple(constants),
        active.get_current_stream, active.get_current_device(),
    )  # fmt: skip


def names_in(value: Any) -> tuple[str, ...]:
    """The names of tensors and numbers in an argument of a launch."""
    return tuple(v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, str))


def getter(names: Sequence[str]) -> Getter:
    """A function that returns the values of these names, as a tuple of any length."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda values: tuple(values[name] for name in names)
