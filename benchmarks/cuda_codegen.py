"""Compiles every CUDA kernel of csrc/cuda for machines that need not be there, and reads what ptxas says of them.

    python benchmarks/cuda_codegen.py [--architectures 80 90]

Prints registers, stack, spilled bytes, static shared memory and 16-byte accesses of each kernel. Exits with 1 on a
spill, on a kernel that should take 16 bytes at a time and does not, and on any warning of nvcc, the host compiler or
ptxas. No GPU and no torch is needed, none is timed.
"""

import argparse
import re
import subprocess
import sys
import tempfile
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


WIDE_ACCESS = re.compile(r"\b(ld|st)\.global\S*\.(?:v4\.[a-z]+32|v2\.[a-z]+64)\b")
WIDE_LOADS = ("step_kernel<Table<StepRow", "find_nonfinite_kernel<Table<StepRow", "products_kernel<Table<Align")
WIDE_STORES = ("step_kernel<Table<StepRow",)


class Kernel(NamedTuple):
    """What the compilers say of one kernel: bytes but for the registers, and instructions that move 16 bytes."""

    name: str
    registers: int
    stack: int
    spilled: int
    shared: int
    loads: int
    stores: int

    @property
    def fails(self) -> bool:
        """A spill, or accesses by element where the kernel means to take 16 bytes."""
        narrow_loads = self.name.startswith(WIDE_LOADS) and not self.loads
        narrow_stores = self.name.startswith(WIDE_STORES) and not self.stores
        return self.spilled > 0 or narrow_loads or narrow_stores


def compile_source(source: Path, architecture: int) -> tuple[list[Kernel], str]:
    """The kernels of one source, and what the compilers said of it where they refused it."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, f"-arch=sm_{architecture}", "--keep", "--keep-dir", folder, str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        ptx = Path(folder, f"{source.stem}.ptx")
        entries = re.split(r"\.entry (\w+)", ptx.read_text() if ptx.exists() else "")
    wide = {name: WIDE_ACCESS.findall(body) for name, body in zip(entries[1::2], entries[2::2], strict=True)}
    output = result.stdout + result.stderr
    found = list(KERNEL.finditer(output))
    kernels = []
    for match, name in zip(found, readable([match["name"] for match in found]), strict=True):
        spilled = int(match["stores"]) + int(match["loads"])
        shared = re.search(r"(\d+) bytes smem", match["more"])
        accesses = wide[match["name"]]
        kernels.append(
            Kernel(
                name,
                int(match["registers"]),
                int(match["stack"]),
                spilled,
                int(shared[1]) if shared else 0,
                accesses.count("ld"),
                accesses.count("st"),
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
            failed += bool(complaint) + sum(kernel.fails for kernel in kernels)
            count += len(kernels)
            sys.stderr.write(complaint)
            for k in kernels:
                print(
                    f"sm_{architecture}  {source.name:18}  {k.registers:3} registers {k.stack:3} stack {k.spilled:3} "
                    f"spilled {k.shared:5} shared  16 bytes: {k.loads:2} loads {k.stores:2} stores  {k.name}"
                )
    print(f"{count} kernels, {failed} of them or of their sources with a spill, a narrow access or a warning")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
