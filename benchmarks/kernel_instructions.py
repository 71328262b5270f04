"""Count the instructions of the Triton kernels that the layers of ResNet-50 launch.

    python benchmarks/kernel_instructions.py            # writes benchmarks/results/instructions-sm_90.json

Each launch of a backward pass in bfloat16 with 128 images is compiled for sm_90 without a GPU. Of its machine code, the
file has the instructions of one step of its main loop, those outside of it, and the tensor-core instructions of a step.
roofline.py reads it.
"""

import argparse
import json
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import triton
from codegen import compile_launch, run_tool
from gpu_layers import FEWEST_CHANNELS, LINEAR, NETWORKS, Layer
from gpu_model import BATCH, CAPABILITY, INSTRUCTIONS, key
from triton.backends.compiler import GPUTarget

import pyfeedback
from pyfeedback import Rule
from pyfeedback.kernels.geometry import layer_geometry
from pyfeedback.kernels.launch import Launch
from pyfeedback.kernels.plan import Problem, plan_backward
from pyfeedback.kernels.tiles import Target

PROCESSORS = 132
RULES = ("fa", "wm", "ia", "aa")  # sa, kp and rules that read probes launch what fa does
FLOAT32 = {"gram", "cross", "f_sparse"}  # values of p_f


def triton_launches(layer: Layer, batch: int, rule: Rule, target: Target) -> tuple[Launch, ...] | None:
    """The launches of a layer's backward pass by the Triton kernels; None if they do not support the layer."""
    if layer.geometry.groups != 1 or min(layer.weight[:2]) < FEWEST_CHANNELS:
        return None
    convolution = None if layer.geometry is LINEAR else layer.geometry[:3]
    geometry, rows, strided = layer_geometry((batch, *layer.input), layer.weight, convolution)
    found = rule.coefficients(batch, 1)
    names = tuple(k for k, v in zip(found._fields, found, strict=True) if v) if found.reads_data else ()
    algorithm = layer.algorithm(batch, found).value
    strides = (geometry.R * geometry.S * geometry.C, geometry.S * geometry.C, geometry.C, 1)
    wanted = (not layer.first, True, found.reads_data)
    sizes = geometry, rows, found.samples or batch
    return plan_backward(Problem(*sizes, algorithm, names, wanted, strides, target, True, strided)).launches


@cache
def launches() -> dict[str, Launch]:
    """The distinct launches of all layers and rules. The joint launches of small layers have two loops; they are left
    out."""
    target, found = Target("bfloat16", False, CAPABILITY, PROCESSORS), {}
    for layer in NETWORKS["resnet50"]:
        for name in RULES:
            for launch in triton_launches(layer, BATCH, pyfeedback.rule(name), target) or ():
                if not launch.kernel.__name__.startswith("joint"):
                    found.setdefault(key(launch), launch)
    return found


def count(name: str) -> dict[str, int]:
    """Instructions of one step of the main loop (``step``), all others (``once``), and tensor-core ones of a step."""
    launch = launches()[name]  # its kernel cannot be sent to another process
    wide = launch.arguments.get("p_f") in FLOAT32
    compiled = compile_launch(launch, "bf16", GPUTarget("cuda", CAPABILITY, 32), wide)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        code = run_tool("nvdisasm", "-c", binary)
    labels, instructions, loops = {}, [], []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(instructions)))
    bodies = [instructions[first:last] for first, last in loops]
    body = max(bodies, key=lambda body: (_tensor_cores(body), -len(body)), default=[])
    if not _tensor_cores(body):  # a loop of one step is unrolled
        body = []
    code = [i for i in instructions if i != "NOP"]
    return {"step": len(body), "once": len(code) - len(body), "tensor": _tensor_cores(body)}


def _tensor_cores(instructions: list[str]) -> int:
    return sum("HGMMA" in i or "HMMA" in i for i in instructions)


def kernels_hash() -> str:
    """A hash of the sources of the kernels."""
    folder = Path(pyfeedback.__file__).parent / "kernels"
    return sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()[:12]


def write(counts: dict[str, dict[str, int]]) -> None:
    """Write the file, a line for each launch."""
    head = {
        "source": "python benchmarks/kernel_instructions.py: compiled without a GPU, not run",
        "triton": triton.__version__,
        "kernels": kernels_hash(),
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in sorted(counts.items())]
    fields = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    fields.append(' "launches": {\n' + ",\n".join(lines) + "\n }")
    INSTRUCTIONS.write_text("{\n" + ",\n".join(fields) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="compilations at once")
    found = launches()
    with ProcessPoolExecutor(parser.parse_args().jobs, mp_context=get_context("spawn")) as pool:
        write(dict(zip(found, pool.map(count, found), strict=True)))
    print(f"{len(found)} launches: {INSTRUCTIONS}")


if __name__ == "__main__":
    main()
