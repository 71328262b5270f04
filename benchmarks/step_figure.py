"""A figure of the time of whole training steps relative to backprop, from the results of one or several runs.

    pytest benchmarks/test_network_steps.py benchmarks/test_probe_steps.py --benchmark-only --benchmark-json steps.json
    python benchmarks/step_figure.py steps.json --out steps.png

A panel for each network, a row for each rule. If several files have the same step, the last one counts.
[docs/networks.md](../docs/networks.md) has the commands for all networks, eager and compiled.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import tables
from matplotlib import pyplot as plt

# The colors of the rules in the figures of examples/.
COLORS = {
    "fa": "#808080", "sa": "#009E73", "kp": "#CC79A7", "wm": "#D55E00", "ia": "#0072B2", "aa": "#E69F00",
}  # fmt: skip
RULES = ("fa", "sa", "kp", "aa-probes", "ia-probes", "wm-probes", "wm", "aa", "ia")
TITLES = {
    "demo": "network of the demo",
    "resnet18": "ResNet-18",
    "resnet18-cifar": "ResNet-18, 3x3 stem",
    "resnet20": "ResNet-20",
    "resnet50": "ResNet-50",
    "mlp": "MLP",
    "convnext": "ConvNeXt-T, stage 1",
    "vit-tiny": "ViT-Tiny",
    "gpt": "character GPT",
}
LOOK = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 200}
EAGER = {"linestyle": "", "marker": "o", "markersize": 5}
COMPILED = {"linestyle": "", "marker": "D", "markersize": 4.5, "markerfacecolor": "white"}
COLUMNS = 3

Ratios = dict[str, dict[str, dict[str, float]]]  # by network, mode and rule


def load(paths: list[Path]) -> tuple[Ratios, str]:
    """The ratios of float32 steps in channels_last, and a line about the machine of the last file.

    Raises:
        ValueError: the files have no such step.
    """
    found: Ratios = {}
    for path in paths:
        content = json.loads(path.read_text())
        records = [each["extra_info"] for each in content["benchmarks"] if "kind" in each["extra_info"]]
        for (network, mode, layout, _, dtype), ratios in tables.whole_steps(records).items():
            if (layout, dtype) == ("channels_last", "float32"):
                found.setdefault(network, {}).setdefault(mode, {}).update(ratios)
    if not found:
        raise ValueError(f"no training step of float32 in channels_last in {', '.join(map(str, paths))}")
    facts = content["machine_info"]["pyfeedback"]
    threads = "one thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return found, f"{facts.get('gpu', facts['cpu'])}, {threads}, torch {facts['torch']}"


def draw(found: Ratios, machine: str, path: Path) -> None:
    """Write the figure."""
    names = [name for name in TITLES if name in found]
    rules = [rule for rule in RULES if any(rule in ratios for modes in found.values() for ratios in modes.values())]
    rows = -(-len(names) // COLUMNS)
    with plt.rc_context(LOOK):
        size = (7.6, 0.6 + rows * (0.7 + 0.2 * len(rules)))
        figure, panels = plt.subplots(
            rows, min(COLUMNS, len(names)), figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
        )
        for axes, name in zip(panels.flat, names, strict=False):
            _panel(axes, found[name], rules)
            axes.set_title(TITLES[name], loc="left", fontsize=9, fontweight="bold")
        for axes in list(panels.flat)[len(names) :]:
            axes.set_visible(False)
        figure.supxlabel(f"time of a training step relative to backprop ({machine})", fontsize=9)
        if any("compiled" in modes for modes in found.values()):
            marks = {"eager (first number)": EAGER, "both compiled (second number)": COMPILED}
            handles = [plt.Line2D([], [], color="#404040", label=label, **mark) for label, mark in marks.items()]
            figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=8)
        figure.savefig(path)
        plt.close(figure)


def _panel(axes: plt.Axes, modes: dict[str, dict[str, float]], rules: list[str]) -> None:
    """A line from 1 to the time of each rule, and its number."""
    eager, compiled = modes.get("eager", {}), modes.get("compiled", {})
    axes.axvline(1, color="#000000", linestyle=(0, (1, 1.2)), linewidth=1, zorder=0)
    for place, rule in enumerate(rules):
        times = [ratios[rule] for ratios in (eager, compiled) if rule in ratios]
        if not times:
            continue
        color, furthest = COLORS[rule.partition("-")[0]], max(times)
        axes.plot([1, furthest], [place, place], color=color, linewidth=1.2, zorder=1)
        for ratios, mark in ((compiled, COMPILED), (eager, EAGER)):
            if rule in ratios:
                axes.plot(ratios[rule], place, color=color, zorder=2, **mark)
        text = " / ".join(f"{time:.2f}" for time in times)
        axes.annotate(text, (max(furthest, 1), place), (6, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_yticks(range(len(rules)), rules)
    axes.set_ylim(len(rules) - 0.5, -0.6)
    axes.margins(x=0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="files of pytest --benchmark-json")
    parser.add_argument("--out", type=Path, required=True, help="the figure, such as steps.png")
    options = parser.parse_args()
    try:
        found, machine = load(options.results)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    draw(found, machine, options.out)


if __name__ == "__main__":
    main()
