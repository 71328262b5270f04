"""Floors and modelled times of every layer on a GPU, by data-sheet peaks: nothing is measured, and no GPU is needed.

    python benchmarks/roofline.py h100                      # layers of ResNet-50, ViT-B and ConvNeXt-T
    python benchmarks/roofline.py h100 --step               # a training step of ResNet-50 under each rule
    python benchmarks/roofline.py h100 --figure docs/figures/roofline    # the layers, and a figure of them

Times are of the backward pass of a layer in bfloat16 with 128 images. The floor moves each tensor once, by the best
algorithm of the rule. The calls of ATen that the composition makes and the launches of the Triton kernels are
those of the code, which runs on tensors without memory. gpu_model.py has the model. Measurements of the device in
benchmarks/results are printed as well.
"""

import argparse
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import costs
import gpu_step
from gpu_layers import NETWORKS, Layer
from gpu_model import BATCH, DEVICES, DTYPE, REACHED, Device, backward_works, seconds

import pyfeedback
from pyfeedback import Rule
from pyfeedback.core.algorithm import algorithms, needs_response, pass_macs

RULES = ("bp", "wm", "ia", "aa")  # fa, sa, kp and rules that read probes have the backward pass of bp
BACKENDS = {"composite": "composition", "triton": "Triton", "triton-unfused": "Triton, unfused"}
RESULTS = Path(__file__).parent / "results"


class Row(NamedTuple):
    """The seconds of one layer under one rule."""

    layer: Layer
    rule: str
    floor: float
    modelled: dict[str, float]  # by backend
    limits: dict[str, str]  # what bounds the longest kernel
    measured: dict[str, float]  # by implementation


def floor(layer: Layer, rule: Rule, device: Device) -> float:
    """Seconds of a backward pass that moves each tensor once, by the algorithm for which this is shortest."""
    x, y = map(math.prod, layer.shapes(BATCH))
    coefficients = rule.coefficients(BATCH, 1)
    sizes = layer.geometry.sizes((BATCH, *layer.input), layer.weight, 0)
    skips = layer.geometry.skips_positions(layer.weight)
    unread = x - sizes.positions * sizes.in_channels if skips else 0
    copied, multiplied = device.gb_s * 1e9 * REACHED["copy"], device.tflop_s * 1e12 * REACHED["product"]
    found = []
    for algorithm, macs in algorithms(sizes, coefficients, True).items():
        response = y * needs_response(algorithm, coefficients) if rule.reads_data else 0
        moved = costs.elements_moved(x, math.prod(layer.weight), y, rule, response, True) - unread - layer.first * x
        macs += (2 - layer.first) * pass_macs(sizes)
        found.append(max(moved * DTYPE.itemsize / copied, 2 * macs / multiplied))
    return min(found)


def rows(network: str, rules: list[str], name: str) -> Iterator[Row]:
    """Every layer of a network under every rule."""
    device = DEVICES[name]
    for layer in NETWORKS[network]:
        for rule in rules:
            works = backward_works(layer, pyfeedback.rule(rule), device)
            longest = {b: max(each, key=lambda work: work.seconds(device)) for b, each in works.items()}
            yield Row(
                layer, rule, floor(layer, pyfeedback.rule(rule), device),
                {backend: seconds(each, device) for backend, each in works.items()},
                {backend: work.limit(device) for backend, work in longest.items()},
                measured(name).get((layer.name, rule), {}),
            )  # fmt: skip


@cache
def measured(device: str) -> dict[tuple[str, str], dict[str, float]]:
    """Seconds of backward passes on the device by layer and rule, from the files of benchmarks/results."""
    found = {}
    for path in RESULTS.glob("*.json"):
        content = json.loads(path.read_text())
        facts = content.get("machine_info", {}).get("pyfeedback", content)
        if device in str(facts.get("gpu", "")).lower().replace(" ", ""):
            for benchmark in content["benchmarks"]:
                record = benchmark.get("extra_info", benchmark)
                kind = [record.get(name) for name in ("kind", "backward_only", "batch", "dtype")]
                if kind == ["layer", True, BATCH, "bfloat16"]:
                    found[record["layer"], record["rule"]] = record["seconds"]
    return found


def table(network: str, found: list[Row]) -> list[str]:
    """The rows as text, in microseconds."""
    lines = [
        f"{network}: backward pass of each layer, bfloat16, {BATCH} images. Microseconds, modelled and unmeasured, and",
        "what bounds the longest kernel",
        f"  {'':32}{'floor':>8}" + "".join(f"{name:>24}" for name in BACKENDS.values()) + f"{'measured':>12}",
    ]
    for row in found:
        cells = ""
        for backend in BACKENDS:
            time = row.modelled.get(backend)
            cells += f"{'-':>24}" if time is None else f"{1e6 * time:11.1f} {row.limits[backend]:12}"
        known = ", ".join(f"{name} {1e6 * time:.1f}" for name, time in row.measured.items()) or "-"
        head = f"{row.layer.name:22} {f'x{row.layer.repeats}':4} {row.rule:4}"
        lines.append(f"  {head}{1e6 * row.floor:8.1f}{cells}{known:>12}")
    return [*lines, ""]


def draw(found: dict[str, list[Row]], rule: str, title: str, path: Path) -> None:
    """Write a figure with a panel for each network: the times of its layers under a rule, relative to their floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    look = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 200}
    marks = {"composite": ("o", "#0072B2"), "triton": ("^", "#D55E00")}
    with plt.rc_context(look | {"svg.hashsalt": "pyfeedback"}):
        sizes = {"height_ratios": [len([r for r in each if r.rule == rule]) for each in found.values()]}
        figure, panels = plt.subplots(len(found), 1, figsize=(6.4, 8.4), layout="constrained", sharex=True,
                                      squeeze=False, gridspec_kw=sizes)  # fmt: skip
        for axes, (network, all_rows) in zip(panels[:, 0], found.items(), strict=True):
            mine = [row for row in all_rows if row.rule == rule]
            places = range(len(mine))
            for backend, (marker, color) in marks.items():
                ratios = [row.modelled.get(backend, math.nan) / row.floor for row in mine]
                axes.plot(ratios, places, marker, color=color, label=BACKENDS[backend], markersize=4)
            axes.axvline(1, color="#808080", linewidth=0.8, label="floor")
            labels = [f"{row.layer.name}  {1e6 * row.floor:.0f} µs" for row in mine]
            axes.set(yticks=places, yticklabels=labels, ylim=(len(mine) - 0.5, -0.5))
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.tick_params("y", labelsize=6)
            axes.set_title(network, loc="left", fontsize=8)
        panels[-1, 0].set_xlabel(
            f"time of the backward pass under {rule} relative to its floor: modelled for {title}, unmeasured"
        )
        panels[0, 0].legend(fontsize=7, frameon=False)
        for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
            figure.savefig(path.with_suffix(suffix), metadata=metadata)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("device", choices=DEVICES)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="by default all")
    parser.add_argument("--rule", action="append", choices=RULES, help="by default all")
    parser.add_argument("--step", action="store_true", help="a training step of ResNet-50 instead")
    parser.add_argument("--center", choices=("yes", "no"), default="yes", help="no: a step without centering")
    parser.add_argument("--figure", type=Path, help="also write this figure, as .png and .svg, of the last rule")
    arguments = parser.parse_args()
    if arguments.step:
        print("\n".join(gpu_step.report(arguments.device, arguments.center == "yes")))
        return
    rules = arguments.rule or list(RULES)
    found = {network: list(rows(network, rules, arguments.device)) for network in arguments.network or NETWORKS}
    for network, each in found.items():
        print("\n".join(table(network, each)))
    if arguments.figure:
        draw(found, rules[-1], arguments.device, arguments.figure)


if __name__ == "__main__":
    main()
