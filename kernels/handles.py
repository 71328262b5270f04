"""Runs the launches of a plan: through Triton's JIT at first, then by handles of the compiled kernels.

The JIT binds, specializes and hashes all arguments of each launch, most of them constants. A handle keeps what the JIT
found for the first launch, and fills in the addresses of the tensors and the values of the named numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from .launch import Launch, needs, prepare, start

ALIGNMENT = 16  # bytes: the only property of a pointer for which Triton specializes a kernel on NVIDIA GPUs
# The versions of Triton in which CompiledKernel.run takes the arguments that a handle passes
OLDEST, NEWEST = (3, 6), (3, 9)
_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


class Handle(NamedTuple):
    """A compiled kernel, and the arguments of its launch by position."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: int
    metadata: tuple[int, ...]
    device: int
    stream: Callable[[int], int]  # the current stream of a device
    arguments: list[Any]  # with the elements of tuples in their place
    tuples: tuple[tuple[int, int], ...]  # the arguments from the first on that are tuples, as parts of ``arguments``
    tensors: tuple[tuple[int, str, torch.dtype], ...]  # the place of each address, the tensor and its dtype
    numbers: tuple[tuple[int, str], ...]

    def launch(self, values: dict[str, Any]) -> bool:
        """Start the launch; False if the kernel was compiled for tensors of another dtype or alignment."""
        arguments, addresses = self.arguments.copy(), 0
        for place, name, dtype in self.tensors:
            t = values[name]
            if t.dtype is not dtype:
                return False
            arguments[place] = address = t.data_ptr()
            addresses |= address
        if addresses % ALIGNMENT:
            return False
        for place, name in self.numbers:
            arguments[place] = values[name]
        if self.tuples:
            arguments[: self.tuples[-1][1]] = [tuple(arguments[i:j]) for i, j in self.tuples]
        self.run(*self.grid, self.stream(self.device), self.function, self.metadata, None, None, None, *arguments)
        return True


class Launcher:
    """Runs launches on one device, one after another."""

    def __init__(self, launches: Sequence[Launch], device: torch.device) -> None:
        self.launches = launches
        self.device = device
        self.needs = needs(launches)
        self.handles: list[Handle | None] = [None] * len(launches)

    def run(self, values: dict[str, Any]) -> None:
        """Run the launches with the tensors and numbers in ``values``; the device must be the current device.

        Raises:
            ValueError: an operand does not have the shape, dtype and layout that the kernels read.
        """
        prepare(self.needs, values, self.device)
        allowed = handles_allowed()
        for i, launch in enumerate(self.launches):
            handle = self.handles[i] if allowed else None
            if handle is None or not handle.launch(values):
                compiled = start(launch, values)
                if allowed and handle is None:
                    self.handles[i] = make_handle(launch, compiled, values)


def handles_allowed() -> bool:
    """Whether a launch by a handle does what one by the JIT does: no hook is called, and nothing is instrumented."""
    if not OLDEST <= _VERSION <= NEWEST:
        return False
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if getattr(hook, "calls", hook):  # a chain of hooks, or a function that has replaced it
            return False
    return not (
        runtime.debug or runtime.add_stages_inspection_hook or triton.knobs.compilation.instrumentation_mode
    )


def make_handle(launch: Launch, compiled: Any, values: dict[str, Any]) -> Handle | None:
    """The handle of a kernel that was compiled for a launch with these values; None if another call may need another.

    Args:
        compiled: what the JIT returned for the launch.
    """
    if not isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
        return None
    active = triton.runtime.driver.active
    if active.get_current_target().backend != "cuda":  # AMD's compiler specializes for the sizes of tensors too
        return None
    arguments, tuples = [], []
    for parameter in launch.kernel.arg_names:
        value = launch.arguments.get(parameter)  # constants are part of the code, and their values are not read
        if isinstance(value, tuple):
            tuples.append((len(arguments), len(arguments) + len(value)))
            arguments += value
        else:
            arguments.append(value)
    tensors, numbers = [], []
    for place, name in enumerate(arguments):
        if isinstance(name, str):
            value = values[name]
            if isinstance(value, Tensor) and value.data_ptr() % ALIGNMENT == 0:
                tensors.append((place, name, value.dtype))
            elif type(value) is float:  # an int is specialized for its value
                numbers.append((place, name))
            else:
                return None
    device = active.get_current_device()
    grid = (*launch.grid, 1, 1)[:3]
    return Handle(
        compiled.run, grid, compiled.function, compiled.packed_metadata, device, active.get_current_stream, arguments,
        tuple(tuples), tuple(tensors), tuple(numbers),
    )  # fmt: skip
