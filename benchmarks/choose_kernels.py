"""Writes a device's table of the layers on which the Triton kernels are faster, from the results of gpu_check.sh.

    python benchmarks/choose_kernels.py OUTDIR/layers.json [FOLDER]

The table is <device>.json in FOLDER, by default kernels/measured. backend("auto") uses the kernels for its layers.
A layer is included if the kernels are faster than the composition by more than the noise, in the same rounds.
"""

import json
import sys
from pathlib import Path

from selection import DTYPES, NETWORKS, RULES

from pyfeedback.core.algorithm import Algorithm, choose_algorithm
from pyfeedback.kernels import measured

LEAST_GAIN = 1.03
PATHS = {"fused": "triton", "unfused": "triton-unfused"}  # and the backends that force them


def faster_layers(records: list[dict]) -> dict[str, str]:
    """The faster path, by key, of the records in which pyfeedback, composed, took longer than with its kernels."""
    shapes = {shape.name: shape for network in NETWORKS.values() for shape in network}
    found = {}
    for record in records:
        path = max(PATHS, key=lambda path: record.get(f"ratio_to_{PATHS[path]}", 0.0))
        if record.get(f"ratio_to_{PATHS[path]}", 0.0) > LEAST_GAIN:
            shape, rule, dtype = shapes[record["layer"]], RULES[record["rule"]], DTYPES[record["dtype"]]
            batch = record["batch"]
            coefficients = rule.coefficients(batch, 1)
            input = (batch, shape.in_channels, shape.map_size, shape.map_size)
            weight = (shape.out_channels, shape.in_channels // shape.groups, shape.kernel, shape.kernel)
            sizes = shape.geometry.sizes(input, weight, coefficients.samples)
            algorithm = choose_algorithm(sizes, coefficients, True) if rule.learns else Algorithm.NONE
            found[measured.key(sizes, algorithm.value, dtype)] = path
    return dict(sorted(found.items()))


def main(path: Path, folder: Path = Path(__file__).parents[1] / "kernels" / "measured") -> int:
    """Write the table; the device is that of the results."""
    results = json.loads(path.read_text())
    device = results["machine_info"]["pyfeedback"].get("gpu")
    if device is None:
        print(f"{path} was measured on no GPU, expected the layers.json of benchmarks/gpu_check.sh")
        return 1
    layers = faster_layers([b["extra_info"] for b in results["benchmarks"] if b["extra_info"]])
    folder.mkdir(exist_ok=True)
    table = folder / f"{device}.json"
    table.write_text(json.dumps(layers, indent=1) + "\n")
    print(f"{table.name}: {len(layers)} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
