"""Compiles every CUDA kernel of csrc/cuda for machines that need not be there, and reads what ptxas says of them.

    python benchmarks/cuda_codegen.py [--architectures 80 90]

Prints registers, stack, spilled bytes and static shared memory of each kernel. Exits with 1 on a spill or on any
warning of nvcc, the host compiler or ptxas. No GPU and no torch is needed, none is timed.
"""

import argparse
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
FLAGS = [
    *("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin", "-o", "/dev/null"),
    *("-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v,-warn-spills,-Werror"),
]
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<more>[^\n]*)",
    re.DOTALL,
)


class Kernel(NamedTuple):
    """What ptxas says of one kernel; bytes but for the registers."""

    name: str
    registers: int
    stack: int
    spilled: int
    shared: int


def compile_source(source: Path, architecture: int) -> tuple[list[Kernel], str]:
    """The kernels of one source, and what the compilers said of it where they refused it."""
    command = ["nvcc", *FLAGS, f"-arch=sm_{architecture}", str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    kernels = []
    for match in KERNEL.finditer(output):
        shared = re.search(r"(\d+) bytes smem", match["more"])
        spilled = int(match["stores"]) + int(match["loads"])
        kernels.append(
            Kernel(
                match["name"], int(match["registers"]), int(match["stack"]), spilled, int(shared[1]) if shared else 0
            )
        )
    return kernels, output if result.returncode else ""


def readable(names: list[str]) -> list[str]:
    """Demangled, without namespaces, arguments and return types."""
    output = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout
    plain = (re.sub(r"(\w+::|\(anonymous namespace\)::|^void )", "", line) for line in output.splitlines())
    return [re.sub(r"\(.*", "", line) for line in plain]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    failed = count = 0
    for architecture in options.architectures:
        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(partial(compile_source, architecture=architecture), SOURCES))
        for source, (kernels, complaint) in zip(SOURCES, results, strict=True):
            failed += bool(complaint) + sum(kernel.spilled > 0 for kernel in kernels)
            count += len(kernels)
            sys.stderr.write(complaint)
            for kernel, name in zip(kernels, readable([kernel.name for kernel in kernels]), strict=True):
                print(
                    f"sm_{architecture}  {source.name:18}  {kernel.registers:3} registers  {kernel.stack:3} stack  "
                    f"{kernel.spilled:3} spilled  {kernel.shared:5} shared  {name}"
                )
    print(f"{count} kernels, {failed} of them or of their sources with a spill or a warning")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
