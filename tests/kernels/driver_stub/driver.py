"""Triton's driver over a stub of libcuda: it compiles for a device that is absent, checks every launch and runs none.

A process that has installed the stub keeps it, so it is installed only in processes started for it. Tensors are CPU
tensors, whose addresses are passed as they are.
"""

import ctypes
import os
from pathlib import Path
from typing import Any, NamedTuple

STREAM = 0x5EED  # the current stream
MOST_PARAMETERS = 128


class Device(NamedTuple):
    """What the stub answers as."""

    capability: int
    processors: int
    shared_per_processor: int
    shared_per_block: int


DEVICES = {
    device.capability: device
    for device in (
        Device(80, 108, 167936, 166912),  # A100
        Device(90, 132, 233472, 232448),  # H100
        Device(100, 148, 233472, 232448),  # B200
        Device(120, 170, 102400, 101376),  # RTX 5090
    )
}


class CLaunch(ctypes.Structure):
    """Launch in libcuda.c."""

    _fields_ = (
        ("function", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("parameters", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("values", ctypes.c_uint64 * MOST_PARAMETERS),
        ("sizes", ctypes.c_uint32 * MOST_PARAMETERS),
    )


class CFunction(ctypes.Structure):
    """Function in libcuda.c."""

    _fields_ = (
        ("name", ctypes.c_char * 64),
        ("parameters", ctypes.c_int),
        ("registers", ctypes.c_int),
        ("local", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("granted", ctypes.c_int),
        ("sizes", ctypes.c_int * MOST_PARAMETERS),
    )


class Recorded(NamedTuple):
    """One launch as the driver received it."""

    function: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    parameters: tuple[bytes, ...]


class Function(NamedTuple):
    """A kernel as its cubin describes it."""

    name: str
    registers: int  # of a thread
    stack: int  # bytes of a thread: those of spilled registers, and some that no instruction uses


class Stub:
    """The stub in this process. Make it before anything else loads libcuda."""

    def __init__(self, library: Path, device: Device) -> None:
        os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
        os.environ.pop("TRITON_INTERPRET", None)
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.library.stub_launch.restype = ctypes.POINTER(CLaunch)
        self.library.stub_function.restype = ctypes.POINTER(CFunction)
        self.library.stub_function.argtypes = (ctypes.c_uint64,)
        self.library.stub_device(*device)
        self.device = device
        self.driver = _driver(device)

    def take(self) -> list[Recorded]:
        """The launches since the last call."""
        found = []
        for i in range(self.library.stub_launches()):
            c = self.library.stub_launch(i).contents
            parameters = (c.values[j].to_bytes(8, "little")[: c.sizes[j]] for j in range(c.parameters))
            found.append(Recorded(c.function, tuple(c.grid), tuple(c.block), c.shared, c.stream, tuple(parameters)))
        self.library.stub_clear()
        return found

    def function(self, handle: int) -> Function:
        """The kernel of a launch."""
        c = self.library.stub_function(handle).contents
        return Function(c.name.decode(), c.registers, c.local)


def _driver(device: Device) -> Any:
    """Make Triton's own driver for NVIDIA GPUs the active one, without what it asks torch.cuda."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class StubDriver(CudaDriver):
        def __init__(self) -> None:
            self.utils = CudaUtils()
            self.launcher_cls = CudaLauncher
            self.get_device_capability = lambda device_index=0: divmod(device.capability, 10)
            self.get_current_stream = lambda device_index: STREAM
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device_index: None

    driver = StubDriver()
    triton.runtime.driver.set_active(driver)
    return driver
