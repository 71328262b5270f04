"""Compiles every Triton kernel with the tiles it ships with, for machines that need not be there, and reads the code.

    python benchmarks/codegen.py [--architectures 80 90 gfx942] [--jobs 2]

Prints registers, spilled accesses, shared memory, tensor-core instructions, waits for wgmma, and the bytes of
each load of a block. Exits with 1 on a spill, on a 16-bit tile of sm_90 without wgmma or with wgmma serialized, on
loads narrower than 16 bytes, and on too much shared memory. No GPU is needed, none is timed. gfx942 is compiled with
the tiles of sm_80, which were not made for it, for one layer of each kernel, and is held to nothing but compiling.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyfeedback.core.coefficients import Coefficients
from pyfeedback.kernels import probe_table
from pyfeedback.kernels.dgrad import dgrad_kernel, dgrad_launch
from pyfeedback.kernels.geometry import Geometry, conv_geometry
from pyfeedback.kernels.joint import joint_launch
from pyfeedback.kernels.launch import Launch
from pyfeedback.kernels.pointwise import pointwise_launch
from pyfeedback.kernels.tiles import DgradTile, Target, WgradTile, choose_joint, choose_pointwise
from pyfeedback.kernels.wgrad import wgrad_kernel, wgrad_launch
from pyfeedback.testing import RESNET20_CIFAR, RESNET50

BATCH = 64
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
POINTWISE_LAYERS = ("64-64-1x1s1@56", "64-256-1x1s1@56", "256-64-1x1s1@56", "256-128-1x1s1@56", "512-128-1x1s1@28",
                 "512-256-1x1s1@28")  # fmt: skip
STRIDED_LAYER = "256-512-1x1s2@56"  # only its dx has launches of its own
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


# What is computed and read, by the kernel's parameters. In a Gram matrix u is x.
WGRADS = {
    "wgrad": "a dw",
    "wgrad+kp": "a dw f decay tie",
    "wgrad feedback": "u f decay",
    "wgrad pair": "a dw u f decay self_ tie",
    "wgrad+gram": "a dw u f",
    "gram": "u f",
    "wgrad pair centered": "a dw u f decay mean=x_mean u_mean=y_shift",
    "wgrad pair shifted": "a dw u f decay mean=x_shift u_mean=y_mean",
    "wgrad+gram centered": "a dw u f mean=x_mean",
    "gram centered": "u f mean=x_mean",
}
DGRADS = {
    "dgrad": "dy dx",
    "dgrad z": "y z x x_scale",
    "dgrad dual": "dy dx y z x x_scale",
    "dgrad dual centered": "dy dx y z x x_scale mean=x_shift",
}
JOINT = {
    "joint kp": ("wgrad+kp", "dgrad"),
    "joint pair": ("wgrad pair", "dgrad"),
    "joint dual": ("wgrad", "dgrad dual"),
    "joint pair centered": ("wgrad pair centered", "dgrad"),
    "joint dual centered": ("wgrad", "dgrad dual centered"),
}
POINTWISE = {  # the second word is the term
    "pointwise none": "decay self_ tie",
    "pointwise cross": "y decay",
    "pointwise z": "y x_scale decay",
    "pointwise gram": "",
    "pointwise cross centered": "y decay mean=x_mean y_mean=y_shift",
    "pointwise cross shifted": "y decay mean=x_shift y_mean=y_mean",
    "pointwise z centered": "y x_scale decay mean=x_shift y_mean=y_mean",
    "pointwise gram centered": "mean=x_mean",
}
PROBES = {  # the kernel and the rule; the layer is that of all launches, its sizes are in a table
    "probes response": ("response_kernel", Coefficients(amp=1.0)),
    "probes response of a difference": ("response_kernel", Coefficients(sparse=1.0, amp=1.0)),
    "probes moment": ("moment_kernel", Coefficients(amp=1.0, null=1.0, normalize=True)),
    "probes gradient": ("gradient_kernel", Coefficients(amp=1.0)),
    "probes gradient with null": ("gradient_kernel", Coefficients(amp=1.0, null=1.0, normalize=True)),
}
FLOATS = ("workspace", "unit", "work")  # tensors in float32 whatever the dtype, and those that end with "mean"
INTEGERS = ("N", "used", "wgrad_programs", "dgrad_tiles", "seed_low", "seed_high", "step")


def jobs(architectures: list[int | str]) -> list[Job]:
    """Every kernel that a rule launches; the Gram matrix only where a layer has one."""
    found = []
    for capability in architectures:
        for dtype in TYPES:
            for layer in LAYERS if dtype == "bf16" else FULL_PRECISION:
                ops = [op for op in (*WGRADS, *DGRADS) if "gram" not in op or "1x1" in layer]
                # A single product differs from the pair in nothing but the other product.
                if dtype == "fp16":
                    ops = ["wgrad pair centered", "dgrad dual centered"]
                elif dtype != "bf16":
                    ops = ["wgrad pair", "wgrad pair centered", "dgrad dual"]
                found += [Job(op, layer, dtype, capability) for op in ops]
        found += [Job("dgrad", STRIDED_LAYER, dtype, capability) for dtype in TYPES]
        for layer in SMALL_LAYERS:
            found += [Job(op, layer, dtype, capability) for op in JOINT for dtype in TYPES if dtype != "fp16"]
        for layer in POINTWISE_LAYERS:
            found += [job for op in POINTWISE if pointwise_tile(job := Job(op, layer, "bf16", capability))]
        found.append(Job("pointwise z centered", POINTWISE_LAYERS[0], "fp16", capability))
        found += [Job(op, "all layers", dtype, capability) for op in PROBES for dtype in TYPES]
    of_amd = {(job.capability, job.op, job.dtype): job for job in found if isinstance(job.capability, str)}
    return [job for job in found if isinstance(job.capability, int)] + list(of_amd.values())


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


def target(job: Job) -> Target:
    """The dtype, and the device whose tiles are compiled."""
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(job.dtype, "float32")
    return Target(dtype, job.dtype == "tf32", job.tiles_of, PROCESSORS[job.tiles_of])


def named(job: Job, on: str, *others: str) -> dict[str, str]:
    """Each parameter by its own name or one that is given, and the unit that float16 alone has."""
    words = [*on.split(), *others, *(["unit"] if job.dtype == "fp16" else [])]
    names = {name: value or name for name, _, value in (word.partition("=") for word in words)}
    if job.dtype in ("fp32", "tf32"):
        names = {name: value.replace("shift", "mean") for name, value in names.items()}
    return names | ({"sample": sample(job)} if "mean" in names else {})


def wgrad(job: Job, tile: WgradTile | None = None) -> Launch:
    """The launch of a weight gradient."""
    g = layer_geometry(job.layer)
    strides = (g.R * g.S * g.C, g.S * g.C, g.C, 1)
    options = named(job, WGRADS[job.op], "x", "weight", "feedback")
    if "gram" in job.op:
        options |= {"u": "x", "u_channels": g.C}
    return wgrad_launch(g, target(job), w_strides=strides, f_strides=strides, tile=tile, **options)


def dgrad(job: Job, tile: DgradTile | None = None) -> Launch:
    """The launch of an input gradient."""
    options = named(job, DGRADS[job.op], "feedback")
    return dgrad_launch(layer_geometry(job.layer), target(job), tile=tile, **options)


def joint(job: Job) -> Launch:
    """The launch of both."""
    g, (first, second) = layer_geometry(job.layer), JOINT[job.op]
    rows = (g.K, g.K if " u " in WGRADS[first] else 0)
    tiles = choose_joint(g, rows, "dual" in second, target(job), BATCH * ("mean" in WGRADS[first]))
    both = wgrad(job._replace(op=first), tiles[0]), dgrad(job._replace(op=second), tiles[1])
    return joint_launch(*both, target(job).processors)


def pointwise_tile(job: Job) -> object:
    """The tile of a one-pass backward, None where the layer has none."""
    samples = BATCH * ("mean" in POINTWISE[job.op])
    return choose_pointwise(layer_geometry(job.layer), job.op.split()[1], target(job), samples)


def pointwise(job: Job) -> Launch:
    """The launch of a one-pass backward."""
    options = named(job, POINTWISE[job.op], "x", "dy", "dx", "dw", "f", "weight", "feedback")
    g = layer_geometry(job.layer)
    return pointwise_launch(g, target(job), job.op.split()[1], used=g.N, **options)


class ProbeLaunch(NamedTuple):
    """A launch for 64 layers with probes; its arguments are tensors and numbers of any value."""

    kernel: Any
    constants: dict[str, Any]
    options: dict[str, Any]
    tile: probe_table.ProbeTile
    arguments: dict[str, str]


def probes(job: Job) -> ProbeLaunch:
    """The launch of all layers with probes."""
    name, rule = PROBES[job.op]
    tile = probe_table.choose_tile(
        target(job).dtype, job.dtype == "tf32", rule.sparse != 0, isinstance(job.capability, str)
    )
    layer = probe_table.Layer(0, 0, (1, 64, 64), (4096, 64, 1), (4096, 64, 1), 32, rule, 0)
    launches = probe_table.launches(probe_table.make_plan((layer,) * 64, target(job).itemsize, tile), tile)
    found = next(launch for launch in launches if launch.kernel.__name__ == name)
    arguments = {parameter: parameter for parameter in found.kernel.arg_names if parameter not in found.constants}
    return ProbeLaunch(found.kernel, found.constants, found.options, tile, arguments)


def compile_job(job: Job) -> Code:
    """Compile as a launch with 16-byte aligned tensors would, and read the machine code."""
    sources = {**dict.fromkeys(WGRADS, wgrad), **dict.fromkeys(DGRADS, dgrad), **dict.fromkeys(JOINT, joint)}
    sources |= dict.fromkeys(PROBES, probes)
    launch = sources.get(job.op, pointwise)(job)
    amd = isinstance(job.capability, str)
    device = GPUTarget("hip", job.capability, 64) if amd else GPUTarget("cuda", job.capability, 32)
    compiled = compile_launch(launch, job.dtype if TYPES[job.dtype] == 2 else "fp32", device, "gram" in job.op)
    return read_amd_code(compiled, launch.tile) if amd else read_code(compiled, launch.tile)


def compile_launch(launch: "Launch | ProbeLaunch", dtype: str, device: GPUTarget, wide: bool) -> Any:
    """Compile a launch whose tensors have this type and are aligned to 16 bytes; f is float32 if ``wide``."""
    element = {"p_table": "i64"} | ({"p_f": "fp32"} if wide else {})
    signature, constants, aligned = {}, dict(launch.constants), {}

    def type_of(name: str, value: object, path: tuple[int, ...]) -> str:
        if value is None:
            constants[path] = None
            return "constexpr"
        if name.startswith("p_"):
            aligned[path] = [["tt.divisibility", 16]]
            wide_tensor = value.removeprefix("p_") in FLOATS or value.endswith("mean")
            return "*" + element.get(name, "fp32" if wide_tensor else dtype)
        return "i32" if name in INTEGERS else "fp32"

    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if isinstance(value, tuple):
            kernel = {"wgrad_arguments": wgrad_kernel, "dgrad_arguments": dgrad_kernel}[name]
            parts = zip(kernel.arg_names, value, strict=False)  # constants and indices are arguments of their own
            signature[name] = tuple(type_of(part, v, (i, j)) for j, (part, v) in enumerate(parts))
        else:
            signature[name] = "constexpr" if name in constants else type_of(name, value, (i,))
    return triton.compile(
        ASTSource(launch.kernel, signature, constants, aligned), target=device, options=launch.options
    )


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
        " ".join(f"{name}{value}" for name, value in tile._asdict().items()),
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
        " ".join(f"{name}{value}" for name, value in tile._asdict().items()),
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
        # A serialized loop waits for each wgmma, a pipelined one once for the instructions of a whole step.
        elif code.waits * 2 > code.wgmma:
            found.append("serialized wgmma")
    # wgmma reads float32 operands K-major only: Triton transposes the others on their way, in copies of 4 bytes.
    transposed = job.dtype == "tf32" and job.capability >= 90
    # The kernels of probes have a branch for weights that are not aligned, with narrow loads; the row of a mean is one.
    narrow = job.op in PROBES or job.op.endswith(("centered", "shifted"))
    width = code.loads[-1] if narrow else code.loads[0]
    if width < 16 and not transposed:
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
