"""The tables of depth_study.py: what was tried and chosen, and the test runs that are done."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import depth_study_figures
from depth_study_runs import Job, Outcome, Setting
from scipy.stats import t

NOTE = "Mean ± half of the 95 % interval (Student's t) over seeds; the number of seeds is in parentheses."
TABLES = {  # column of the rows: title of the table, and digits
    "accuracy": ("Test accuracy (%)", 1),
    "behind bp": ("Behind backprop (points of test accuracy, paired by seed)", 1),
    "angle": ("Angle of feedback to weight (degrees, mean over the layers)", 1),
    "norm ratio": ("Norm of the feedback relative to the weight (mean over the layers)", 2),
}


class Group(NamedTuple):
    """Test runs that differ only in their seed."""

    network: str
    data: str
    rule: str
    epochs: int


def write(
    tried: Mapping[Setting, Sequence[Outcome]],
    chosen: Mapping[str, Setting],
    results: Mapping[Group, Sequence[Outcome | None]],
    out: Path,
) -> None:
    """Write search.csv, results.csv, results.md and the figures.

    Args:
        tried: the finished validation runs of each candidate.
        chosen: the setting of each rule.
        results: the test runs, one for each seed; None if it is missing.
    """
    found = rows(results)
    write_csv(out / "search.csv", search_rows(tried, chosen))
    write_csv(out / "results.csv", found)
    figures = depth_study_figures.draw(found, out) if found else []
    (out / "results.md").write_text(page(search_rows(tried, chosen), found, figures))


def search_rows(tried: Mapping[Setting, Sequence[Outcome]], chosen: Mapping[str, Setting]) -> list[dict]:
    """One row for each candidate."""
    return [
        {
            "rule": setting.name,
            "weight decay": f"{setting.weight_decay:g}",
            "tau": f"{setting.tau:g}" if setting.tau else "",
            "nu": f"{setting.nu:g}" if setting.nu else "",
            "growth": f"{setting.growth:g}" if setting.growth else "",
            "seeds": len(outcomes),
            "validation accuracy (%)": round(statistics.fmean(o.accuracy[-1] for o in outcomes), 2) if outcomes else "",
            "chosen": "yes" if chosen.get(setting.name) == setting else "",
        }
        for setting, outcomes in tried.items()
    ]


def rows(results: Mapping[Group, Sequence[Outcome | None]]) -> list[dict]:
    """One row for each group with at least one finished run."""
    found = []
    for group, outcomes in results.items():
        done = [outcome for outcome in outcomes if outcome is not None]
        if not done:
            continue
        bp = results.get(group._replace(rule="bp"), [None] * len(outcomes))
        pairs = [(a, b) for a, b in zip(outcomes, bp, strict=True) if a is not None and b is not None]
        found.append({
            **group._asdict(),
            **spread("accuracy", [outcome.accuracy[-1] for outcome in done]),
            **spread("behind bp", [b.accuracy[-1] - a.accuracy[-1] for a, b in pairs] if group.rule != "bp" else []),
            **spread("angle", [outcome.angle for outcome in done if outcome.angle is not None]),
            **spread("norm ratio", [outcome.norm_ratio for outcome in done if outcome.norm_ratio is not None]),
            "diverged": sum(outcome.diverged for outcome in done),
            "seconds": round(statistics.fmean(outcome.seconds for outcome in done), 1),
        })  # fmt: skip
    return found


def spread(name: str, values: Sequence[float]) -> dict:
    """The mean, half of its 95 % interval and the number of values, as three columns; empty where there is none."""
    n = len(values)
    half = t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else ""
    mean = statistics.fmean(values) if values else ""
    return {name: _rounded(mean), f"{name} interval": _rounded(half), f"{name} seeds": n}


def _rounded(value: float | str) -> float | str:
    return value if isinstance(value, str) else round(float(value), 3)


def title(network: str, data: str, epochs: int) -> str:
    """The heading of a column: "ResNet-20", "ResNet-20, fashion-mnist" or "ResNet-20, 24 epochs"."""
    kind = "ResNet-" if network.startswith("resnet") else "plain-"
    name = kind + network.lstrip("resntplai") + ("" if data == "cluttered" else f", {data}")
    return name + (f", {epochs} epochs" if epochs > Job.epochs else "")


def depth(network: str) -> int:
    """The number of layers in a network's name."""
    return int(network.lstrip("resntplai"))


def table(found: Sequence[dict], column: str, digits: int) -> str:
    """A table in Markdown with a line for each rule, and a column for each network, data set and number of epochs."""
    cases = sorted({case(row) for row in found}, key=_place)
    names = list(dict.fromkeys(row["rule"] for row in found))
    cells = {(row["rule"], *case(row)): _cell(row, column, digits) for row in found}
    lines = [["rule", *(title(*found) for found in cases)], ["---"] * (1 + len(cases))]
    for name in names:
        line = [cells.get((name, *found), "") for found in cases]
        if any(line):
            lines.append([name, *line])
    return markdown(lines)


def case(row: dict) -> tuple[str, str, int]:
    """The network, data set and number of epochs of a row."""
    return row["network"], row["data"], row["epochs"]


def _place(found: tuple[str, str, int]) -> tuple:
    network, data, epochs = found
    return (network.startswith("plain"), data != "cluttered", epochs, depth(network))


def _cell(row: dict, column: str, digits: int) -> str:
    mean, half, seeds = row[column], row[f"{column} interval"], row[f"{column} seeds"]
    if not seeds:
        return ""
    interval = "" if half == "" else f" ± {half:.{digits}f}"
    diverged = f", {row['diverged']} diverged" if row["diverged"] and column == "accuracy" else ""
    return f"{mean:.{digits}f}{interval} ({seeds}{diverged})"


def page(search: Sequence[dict], found: Sequence[dict], figures: Sequence[str]) -> str:
    """All tables and figures in Markdown."""
    parts = ["# Results of the depth study\n", "Made by `python examples/depth_study.py --report`.\n"]
    for name in figures:
        parts.append(f"![{name.replace('_', ' ')} against the number of layers]({name}.png)\n")
    if found:
        parts.append(NOTE + "\n")
        for column, (heading, digits) in TABLES.items():
            parts.append(f"## {heading}\n\n{table(found, column, digits)}")
    if search:
        lines = [list(search[0]), ["---"] * len(search[0]), *([str(cell) for cell in row.values()] for row in search)]
        parts.append(f"## Selection on validation images\n\n{markdown(lines)}")
    return "\n".join(parts)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the second line separates the header."""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_csv(path: Path, content: Sequence[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(content[0]) if content else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(content)
