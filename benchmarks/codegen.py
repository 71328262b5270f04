"""Compiles every Triton kernel with the tiles it ships with, for machines that need not be there, and reads the code.

    python benchmarks/codegen.py [--architectures 80 90 gfx942] [--jobs 2]

Prints registers, spilled accesses, shared memory, tensor-core instructions, waits for wgmma, and the bytes of
each load of a block. Exits with 1 on a spill, on a 16-bit tile of sm_90 without wgmma or with wgmma serialised, on
loads narrower than 16 bytes, and on too much shared memory. No GPU is needed, none is timed. gfx942 is compiled with
the tiles of sm_80, which were not made for it, and is held to nothing but compiling.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyfeedback.kernels.dgrad import dgrad_constants
from pyfeedback.kernels.dgrad_kernel import dgrad_kernel
from pyfeedback.kernels.geometry import Geometry, conv_geometry
from pyfeedback.kernels.joint import RENAMED
from pyfeedback.kernels.joint_kernel import joint_kernel
from pyfeedback.kernels.launch import options
from pyfeedback.kernels.single import single_constants
from pyfeedback.kernels.single_kernel import single_kernel
from pyfeedback.kernels.tiles import DgradTile, WgradTile, choose_dgrad, choose_joint, choose_single, choose_wgrad
from pyfeedback.kernels.wgrad import wgrad_constants
from pyfeedback.kernels.wgrad_kernel import wgrad_kernel
from pyfeedback.testing import RESNET20_CIFAR, RESNET50

BATCH = 32
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
PROCESSORS = {80: 108, 90: 132}
LAYERS = (
    "64-64-1x1s1@56",
    "64-256-1x1s1@56",
    "256-1024-1x1s1@14",
    "64-64-3x3s1@56",
    "128-128-3x3s2@56",
    "256-256-3x3s1@14",
)
SINGLE_LAYERS = ("64-64-1x1s1@56", "64-256-1x1s1@56", "256-64-1x1s1@56", "256-128-1x1s1@56", "512-128-1x1s1@28",
                 "512-256-1x1s1@28")  # fmt: skip
SMALL_LAYERS = ("512-512-3x3s1@7", "512-2048-1x1s1@7", "64-64-3x3s1@8")
FULL_PRECISION = ("64-256-1x1s1@56", "128-128-3x3s2@56")
TYPES = {"bf16": 2, "fp16": 2, "fp32": 4, "tf32": 4}  # fp16 has bf16's code, and units besides


class Job(NamedTuple):
    """One kernel for one layer, dtype and architecture."""

    op: str
    layer: str
    dtype: str
    capability: int | str  # or the name of an AMD architecture

    @property
    def tiles_of(self) -> int:
        """The architecture whose tiles are compiled."""
        return self.capability if isinstance(self.capability, int) else 80


class Code(NamedTuple):
    """What the machine code of one kernel holds."""

    tile: str
    registers: int
    spills: int
    shared: int
    wgmma: int
    mma: int
    waits: int
    loads: tuple[int, ...]  # bytes of each kind of load of a block


WGRADS = {
    "wgrad": {"HAS_A"},
    "wgrad+kp": {"HAS_A", "HAS_F", "USE_FEEDBACK", "USE_TIE"},
    "wgrad feedback": {"HAS_U", "HAS_F", "USE_FEEDBACK"},
    "wgrad pair": {"HAS_A", "HAS_U", "HAS_F", "USE_FEEDBACK", "USE_WEIGHT", "USE_TIE"},
    "wgrad+moment": {"HAS_A", "HAS_U", "HAS_F"},
    "moment": {"HAS_U", "HAS_F", "SYMMETRIC"},
    "wgrad pair centered": {"HAS_A", "HAS_U", "HAS_F", "USE_FEEDBACK", "CENTER"},
    "wgrad+moment centered": {"HAS_A", "HAS_U", "HAS_F", "CENTER"},
    "moment centered": {"HAS_U", "HAS_F", "SYMMETRIC", "CENTER"},
}
DGRADS = {
    "dgrad": {"HAS_DX"},
    "dgrad z": {"HAS_Z", "USE_X"},
    "dgrad dual": {"HAS_DX", "HAS_Z", "USE_X"},
    "dgrad dual centered": {"HAS_DX", "HAS_Z", "USE_X", "CENTER"},
}
JOINTS = {
    "joint kp": ("wgrad+kp", "dgrad"),
    "joint pair": ("wgrad pair", "dgrad"),
    "joint dual": ("wgrad", "dgrad dual"),
    "joint pair centered": ("wgrad pair centered", "dgrad"),
    "joint dual centered": ("wgrad", "dgrad dual centered"),
}
SINGLES = {  # the term, and what its epilogue reads
    "single none": {"HAS_F", "USE_WEIGHT", "USE_FEEDBACK", "USE_TIE"},
    "single response": {"HAS_F", "USE_FEEDBACK"},
    "single projection": {"HAS_F", "USE_X", "USE_FEEDBACK"},
    "single moment": {"HAS_F"},
    "single response centered": {"HAS_F", "USE_FEEDBACK", "CENTER"},
    "single projection centered": {"HAS_F", "USE_X", "USE_FEEDBACK", "CENTER"},
    "single moment centered": {"HAS_F", "CENTER"},
}


def jobs(architectures: list[int | str]) -> list[Job]:
    """Every kernel that a rule launches; the second moment only where a layer has one."""
    found = []
    for capability in architectures:
        for dtype in TYPES:
            for layer in LAYERS if dtype == "bf16" else FULL_PRECISION:
                ops = [op for op in (*WGRADS, *DGRADS) if "moment" not in op or "1x1" in layer]
                # What is launched alone differs from its pair in nothing but one product.
                if dtype == "fp16":
                    ops = ["wgrad pair centered", "dgrad dual centered"]
                elif dtype != "bf16":
                    ops = ["wgrad pair", "wgrad pair centered", "dgrad dual"]
                found += [Job(op, layer, dtype, capability) for op in ops]
        for layer in SMALL_LAYERS:
            found += [Job(op, layer, dtype, capability) for op in JOINTS for dtype in TYPES if dtype != "fp16"]
        for layer in SINGLE_LAYERS:
            found += [job for op in SINGLES if single_tile(job := Job(op, layer, "bf16", capability))]
        found.append(Job("single projection centered", SINGLE_LAYERS[0], "fp16", capability))
    return found


def layer_geometry(name: str) -> Geometry:
    """The layer of ResNet-50 or ResNet-20 of this name, as a linear layer where it is one."""
    shape = next(s for s in (*RESNET50, *RESNET20_CIFAR) if s.name == name)
    input = (BATCH, shape.in_channels, shape.map_size, shape.map_size)
    weight = (shape.out_channels, shape.in_channels, shape.kernel, shape.kernel)
    return conv_geometry(input, weight, *shape.window[:3]).flat()


def sample(job: Job) -> int:
    """Rows of the mean: the input positions that one sample of the layer has, of a 1x1 layer those that are read."""
    shape = next(s for s in (*RESNET50, *RESNET20_CIFAR) if s.name == job.layer)
    return (shape.map_size // (shape.stride if shape.kernel == 1 else 1)) ** 2


def no_unit(job: Job) -> dict[str, None]:
    """In what the second product is counted, of float16 alone."""
    return {} if job.dtype == "fp16" else {"p_unit": None}


def means(on: set[str], moment: bool) -> int:
    """Operands that are centred while they are loaded."""
    return ("CENTER" in on) * (1 + moment)


def wgrad_source(job: Job, tile: WgradTile | None = None) -> tuple[object, dict, dict, object]:
    """Kernel, compile-time arguments, run-time integers, tile."""
    g, on = layer_geometry(job.layer), WGRADS[job.op]
    flags = {f: f in on for f in ("HAS_A", "HAS_U", "HAS_F", "USE_FEEDBACK", "USE_WEIGHT", "USE_TIE", "SYMMETRIC")}
    flags["MOMENT"] = "moment" in job.op
    u = g.C if "moment" in job.op else g.K
    rows = (g.K if "HAS_A" in on else 0, u if "HAS_U" in on else 0)
    device = (job.tiles_of, PROCESSORS[job.tiles_of])
    tile = tile or choose_wgrad(
        g, rows, TYPES[job.dtype], *device, flags["SYMMETRIC"], means=means(on, flags["MOMENT"])
    )
    constants = wgrad_constants(g, u, flags, sample(job), False, "tf32" if job.dtype == "tf32" else "ieee", tile)
    strides = {"k": g.R * g.S * g.C, "r": g.S * g.C, "s": g.C, "c": 1}
    written = {"w": "HAS_A" in on, "f": "HAS_F" in on}
    integers = {f"stride_{t}{d}": size * written[t] for t in written for d, size in strides.items()}
    absent = {"p_a": "HAS_A", "p_u": "HAS_U", "p_dw": "HAS_A", "p_f": "HAS_F", "p_weight": "USE_WEIGHT",
              "p_feedback": "USE_FEEDBACK", "p_mean": "CENTER"}  # fmt: skip
    constants |= {name: None for name, flag in absent.items() if flag not in on}
    constants |= no_unit(job)
    if tile.splits == 1:
        constants |= {"p_partial": None, "p_arrived": None}
    return wgrad_kernel, constants, integers, tile


def dgrad_source(job: Job, tile: DgradTile | None = None) -> tuple[object, dict, dict, object]:
    """Kernel, compile-time arguments, run-time integers, tile."""
    g, on = layer_geometry(job.layer), DGRADS[job.op]
    flags = {f: f in on for f in ("HAS_DX", "HAS_Z", "USE_X")}
    tile = tile or choose_dgrad(g, {"HAS_DX", "HAS_Z"} <= on, TYPES[job.dtype], job.tiles_of)
    constants = dgrad_constants(g, flags, sample(job), False, "tf32" if job.dtype == "tf32" else "ieee", tile)
    absent = {"p_dy": "HAS_DX", "p_dx": "HAS_DX", "p_y": "HAS_Z", "p_z": "HAS_Z", "p_x": "USE_X",
              "p_mean": "CENTER"}  # fmt: skip
    constants |= {name: None for name, flag in absent.items() if flag not in on} | no_unit(job)
    return dgrad_kernel, constants, {}, tile


def joint_source(job: Job) -> tuple[object, dict, dict, object]:
    """Kernel, compile-time arguments, run-time integers, tile."""
    g, (wgrad, dgrad) = layer_geometry(job.layer), JOINTS[job.op]
    rows = (g.K, g.K if "HAS_U" in WGRADS[wgrad] else 0)
    device = (job.tiles_of, PROCESSORS[job.tiles_of])
    dual = {"HAS_DX", "HAS_Z"} <= DGRADS[dgrad]
    tiles = choose_joint(g, rows, dual, TYPES[job.dtype], *device, means(WGRADS[wgrad], "moment" in wgrad))
    _, constants, integers, tile = wgrad_source(job._replace(op=wgrad), tiles[0])
    _, others, *_ = dgrad_source(job._replace(op=dgrad), tiles[1])
    sizes = dict.fromkeys(("n", "wgrad_tiles", "dgrad_tiles", "dgrad_classes"), 17)
    return joint_kernel, {RENAMED.get(k, k): v for k, v in others.items()} | constants, integers | sizes, tile


def single_tile(job: Job) -> object:
    """The tile of a single pass, None where the layer has none."""
    g, term = layer_geometry(job.layer), job.op.split()[1]
    device = (job.tiles_of, PROCESSORS[job.tiles_of])
    return choose_single(g, term, TYPES[job.dtype], *device, "CENTER" in SINGLES[job.op])


def single_source(job: Job) -> tuple[object, dict, dict, object]:
    """Kernel, compile-time arguments, run-time integers, tile."""
    g, on, term = layer_geometry(job.layer), SINGLES[job.op], job.op.split()[1]
    flags = {f: f in on for f in ("HAS_F", "USE_X", "USE_WEIGHT", "USE_FEEDBACK", "USE_TIE")}
    tile = single_tile(job)
    constants = single_constants(g, term, flags, sample(job), False, "ieee", tile)
    absent = {"p_y": term in ("response", "projection"), "p_weight": "USE_WEIGHT" in on, "p_mean": "CENTER" in on}
    constants |= {name: None for name, there in absent.items() if not there} | no_unit(job)
    return single_kernel, constants, {"positions": 17, "used": 17}, tile


def compile_job(job: Job) -> Code:
    """Compile as a launch with 16-byte aligned tensors would, and read the machine code."""
    source_of = {**dict.fromkeys(WGRADS, wgrad_source), **dict.fromkeys(DGRADS, dgrad_source),
                 **dict.fromkeys(JOINTS, joint_source)}  # fmt: skip
    kernel, constants, integers, tile = source_of.get(job.op, single_source)(job)
    constants |= {name: 1 for name, value in integers.items() if value == 1}
    constants |= {name: None for name in kernel.arg_names if name.startswith("i_")}
    element = {"p_arrived": "i32", **dict.fromkeys(("p_partial", "p_mean", "p_unit", "p_input_mean"), "fp32")}
    if "moment" in job.op:
        element["p_f"] = "fp32"
    signature, aligned = {}, []
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = "*" + element.get(name, job.dtype if TYPES[job.dtype] == 2 else "fp32")
            aligned.append(name)
        else:
            signature[name] = "i32" if name == "N" or name in integers else "fp32"
            if integers.get(name, 1) % 16 == 0:
                aligned.append(name)
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    amd = isinstance(job.capability, str)
    target = GPUTarget("hip", job.capability, 64) if amd else GPUTarget("cuda", job.capability, 32)
    source = ASTSource(kernel, signature, constants, attrs)
    compiled = triton.compile(source, target=target, options=options(tile))
    return read_amd_code(compiled, tile) if amd else read_code(compiled, tile)


def read_code(compiled, tile) -> Code:
    """Counts of what matters in the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        usage = run_tool("cuobjdump", "-res-usage", binary)
        sass = run_tool("nvdisasm", "-c", binary)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    # A loop of a single step is no loop, and loads through registers.
    loads = re.findall(r"\bLDGSTS\S*", sass) or re.findall(r"\bLDG\S*", sass)
    widths = {16 if ".128" in load else 8 if ".64" in load else 4 for load in loads}
    return Code(
        " ".join(f"{name}{value}" for name, value in vars(tile).items()),
        registers,
        count(r"\b(?:STL|LDL)\b"),
        compiled.metadata.shared,
        count(r"\bHGMMA\b"),
        count(r"\bHMMA\b"),
        count(r"WARPGROUP\.DEPBAR"),
        tuple(sorted(widths)),
    )


def read_amd_code(compiled, tile) -> Code:
    """The same of an AMD architecture: matrix-core instructions in the place of mma, waits left out."""
    text = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s*(\d+)", text).group(1))

    loads = re.findall(r"\b(?:buffer|global)_load_(\w+)", text)
    widths = {16 if "x4" in load else 8 if "x2" in load else 4 for load in loads}
    return Code(
        " ".join(f"{name}{value}" for name, value in vars(tile).items()),
        number("vgpr_count"),
        number("vgpr_spill_count"),
        compiled.metadata.shared,
        0,
        len(re.findall(r"\bv_mfma", text)),
        0,
        tuple(sorted(widths)),
    )


def run_tool(name: str, *arguments) -> str:
    """Output of a tool that Triton brings along."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def faults(job: Job, code: Code) -> list[str]:
    """What must not be; empty where all is well."""
    found = []
    if isinstance(job.capability, str):
        return found
    if code.spills:
        found.append("spills")
    if code.shared > SHARED_LIMIT[job.capability]:
        found.append("too much shared memory")
    if job.capability >= 90 and TYPES[job.dtype] == 2:
        if not code.wgmma:
            found.append("no wgmma")
        # A serialised loop waits for every wgmma; a pipelined one once for the instructions of a whole step.
        elif code.waits * 2 > code.wgmma:
            found.append("serialised wgmma")
    # wgmma reads float32 operands K-major only: Triton transposes the others on their way, in copies of 4 bytes.
    transposed = job.dtype == "tf32" and job.capability >= 90
    if code.loads[0] < 16 and not transposed:
        found.append("narrow loads")
    return found


def main() -> int:
    """The table, and 1 if anything in it must not be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", nargs="+", choices=["80", "90", "gfx942"], default=["80", "90"])
    parser.add_argument("--jobs", type=int, default=2, help="compilations at once")
    arguments = parser.parse_args()
    todo = jobs([int(a) if a.isdigit() else a for a in arguments.architectures])
    columns = ("regs", "spills", "shared", "wgmma", "mma", "waits", "loads")
    print(f"triton {triton.__version__}", *(f"{c:>7}" for c in columns))
    failed = 0
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for job, code in zip(todo, pool.map(compile_job, todo), strict=True):
            wrong = faults(job, code)
            failed += bool(wrong)
            architecture = job.capability if isinstance(job.capability, str) else f"sm_{job.capability}"
            name = f"{architecture} {job.dtype} {job.op} {job.layer}"
            numbers = (*code[1:-1], "/".join(map(str, code.loads)))
            print(f"{name:45}", *(f"{n:>7}" for n in numbers), f" {code.tile}", *wrong, flush=True)
    print(f"{len(todo)} kernels, {failed} of them not as they must be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
