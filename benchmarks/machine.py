"""Facts about the machine, stored with the results."""

import platform
import subprocess
from pathlib import Path

import torch

import pyfeedback

GPU_QUERY = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "memory.total")


def facts(device: torch.device) -> dict[str, object]:
    """Versions, number of threads and processor; for a GPU also its name, driver and clocks."""
    info = pyfeedback.build_info()
    found: dict[str, object] = {
        "device": device.type,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiled_library": {"cpu": info.cpu, "cuda": info.cuda, "compiler": info.compiler},
        "commit": _first_line(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": {"cudnn": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32},
            "triton": _triton_version(),
            "nvidia_smi": _nvidia_smi(),
        }
    return found


def cpu_model() -> str:
    """The name of the processor as reported by the kernel."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def _nvidia_smi() -> dict[str, str]:
    line = _first_line(["nvidia-smi", f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader"])
    return dict(zip(GPU_QUERY, (value.strip() for value in line.split(",")), strict=False))


def _first_line(command: list[str]) -> str:
    """The first line of a command's output, or "" if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
