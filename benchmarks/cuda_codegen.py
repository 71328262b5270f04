"""Compiles every CUDA kernel of csrc/cuda for machines that need not be there, and reads what ptxas says of them.

    python benchmarks/cuda_codegen.py [--architectures 80 90]

Prints registers, stack, spilled bytes, static shared memory and 16-byte accesses of each kernel, and the instructions
per multiply-add of the depthwise kernels by tiles, from nvdisasm of the CUDA toolkit or of Triton. Exits with 1 on a
spill, on a kernel that should take 16 bytes at a time and does not, on more than two instructions per multiply-add, and
on any warning of nvcc, the host compiler or ptxas. No GPU and no torch is needed, none is timed.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
FLAGS = [
    *("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin"),
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

ARITHMETIC = "depthwise_tile_kernel<"
MOST_PER_FFMA = 2.0
# Straight code that multiplies at least the smallest row of a kernel, of three taps, by the eight columns of a tile.
LEAST_FFMA = 24
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*(\w+)")


class Kernel(NamedTuple):
    """What the compilers say of one kernel: bytes but for the registers, and instructions that move 16 bytes."""

    name: str
    registers: int
    stack: int
    spilled: int
    shared: int
    loads: int
    stores: int
    per_ffma: float | None = None  # instructions per multiply-add

    @property
    def fails(self) -> bool:
        """A spill, accesses by element where the kernel means to take 16 bytes, or too little arithmetic."""
        narrow_loads = self.name.startswith(WIDE_LOADS) and not self.loads
        narrow_stores = self.name.startswith(WIDE_STORES) and not self.stores
        slow = self.name.startswith(ARITHMETIC) and not (self.per_ffma and self.per_ffma <= MOST_PER_FFMA)
        return self.spilled > 0 or narrow_loads or narrow_stores or slow


def compile_source(source: Path, architecture: int) -> tuple[list[Kernel], str]:
    """The kernels of one source, and what the compilers said of it where they refused it."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = ["nvcc", *FLAGS, f"-arch=sm_{architecture}", "--keep", "--keep-dir", folder]
        result = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True)
        ratios = instructions_per_ffma(cubin) if ARITHMETIC[:-1] in source.read_text() and cubin.exists() else {}
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
                ratios.get(match["name"]),
            )
        )
    return kernels, output if result.returncode else ""


def instructions_per_ffma(cubin: Path) -> dict[str, float]:
    """Of each kernel, over its stretches of code without a branch that multiply at least LEAST_FFMA times."""
    result = subprocess.run([nvdisasm(), "-c", cubin], capture_output=True, text=True, check=True)
    sections = re.split(r"\.section\s+\.text\.(\w+)", result.stdout)
    ratios = {}
    for name, body in zip(sections[1::2], sections[2::2], strict=True):
        stretches: list[list[str]] = [[]]
        for line in body.splitlines():
            match = INSTRUCTION.match(line)
            if match:
                stretches[-1].append(match[1])
            if line.startswith(".L") or (match and match[1] in ("BRA", "EXIT")):
                stretches.append([])
        counts = [(len(stretch), stretch.count("FFMA")) for stretch in stretches]
        instructions, ffma = map(sum, zip(*((i, f) for i, f in counts if f >= LEAST_FFMA), (0, 0), strict=True))
        if ffma:
            ratios[name] = instructions / ffma
    return ratios


def nvdisasm() -> str:
    """The disassembler of the toolkit, or else of Triton."""
    triton = importlib.util.find_spec("triton")
    of_triton = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else ""
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path=of_triton)
    if found is None:
        raise SystemExit("cuda_codegen.py: nvdisasm not found; expected it on PATH or in an installed Triton")
    return found


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
                per_ffma = f"  {k.per_ffma:.2f} instructions per FFMA" if k.per_ffma else ""
                print(
                    f"sm_{architecture}  {source.name:18}  {k.registers:3} registers {k.stack:3} stack {k.spilled:3} "
                    f"spilled {k.shared:5} shared  16 bytes: {k.loads:2} loads {k.stores:2} stores  {k.name}{per_ffma}"
                )
    print(
        f"{count} kernels, {failed} of them or of their sources with a spill, narrow access, slow arithmetic or warning"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
