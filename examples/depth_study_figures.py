"""The figures of depth_study.py: accuracy, gap to backprop and angle by depth, for residual and plain networks."""

from collections.abc import Sequence
from pathlib import Path

from demo_figure import STYLES
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from study_figures import ACCURACY, ANGLE, BEHIND, LOOK, MARKERS
from two_routes import TITLES

FIGURES = {"accuracy": ACCURACY, "behind bp": BEHIND, "angle": ANGLE}  # column of the rows: label of the axis
PANELS = {"resnet": "residual networks", "plain": "plain networks"}
ON_DATA = (0, (1, 1))  # the dash of a rule that reads activations


def draw(rows: Sequence[dict], out: Path) -> list[str]:
    """Write each figure as PNG and SVG, from the rows of the cluttered digits with the fewest epochs.

    Returns the names of the figures.
    """
    epochs = min(row["epochs"] for row in rows)
    rows = [row for row in rows if row["data"] == "cluttered" and row["epochs"] == epochs]
    for column in FIGURES:
        _draw(rows, column, out / column.replace(" ", "_"))
    return [column.replace(" ", "_") for column in FIGURES]


def _draw(rows: Sequence[dict], column: str, path: Path) -> None:
    names = [name for name in dict.fromkeys(row["rule"] for row in rows) if _has(rows, name, column)]
    with plt.rc_context(LOOK | {"svg.hashsalt": "pyfeedback"}):
        figure, found = plt.subplots(1, len(PANELS), figsize=(7.2, 3.8), layout="constrained", sharey=True)
        for axes, (kind, heading) in zip(found, PANELS.items(), strict=True):
            mine = [row for row in rows if row["network"].startswith(kind)]
            _panel(axes, mine, names, column, kind)
            axes.set_title(heading, loc="left", fontsize=9)
        _scale(found[0], column)
        handles = [plt.Line2D([], [], label=_label(name), **_line(name)) for name in names]
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, handlelength=3)
        for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
            figure.savefig(path.with_suffix(suffix), metadata=metadata)
        plt.close(figure)


def _has(rows: Sequence[dict], name: str, column: str) -> bool:
    return any(row["rule"] == name and row[column] != "" for row in rows)


def _panel(axes: Axes, rows: Sequence[dict], names: Sequence[str], column: str, kind: str) -> None:
    """A line for each rule, with its 95 % interval where there are two seeds or more.

    The interval is a band, or a bar for gaps: most of them are near zero, where bands would hide each other.
    """
    depths = sorted({_depth(row, kind) for row in rows})
    bars = column == "behind bp"
    apart = (depths[-1] - depths[0]) / 80 if bars and depths else 0.0
    for i, name in enumerate(names):
        mine = sorted((r for r in rows if r["rule"] == name and r[column] != ""), key=lambda row: _depth(row, kind))
        line, shift = _line(name), apart * (i - (len(names) - 1) / 2)
        axes.plot([_depth(row, kind) + shift for row in mine], [row[column] for row in mine], **line)
        known = [row for row in mine if row[f"{column} interval"] != ""]
        at, means = [_depth(row, kind) + shift for row in known], [row[column] for row in known]
        halves = [row[f"{column} interval"] for row in known]
        if bars:
            axes.errorbar(at, means, halves, fmt="none", ecolor=line["color"], elinewidth=1)
        else:
            low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
            axes.fill_between(at, low, high, color=line["color"], alpha=0.15, linewidth=0)
    if bars:
        axes.axhline(0, color=STYLES["bp"][0], linestyle=STYLES["bp"][1], linewidth=1, zorder=0)
    axes.set_xlabel("layers")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(depths))


def _depth(row: dict, kind: str) -> int:
    return int(row["network"].removeprefix(kind))


def _scale(axes: Axes, column: str) -> None:
    """Label the shared axis. A gap is linear up to one point and logarithmic beyond."""
    axes.set_ylabel(FIGURES[column])
    if column == "angle":
        axes.set(ylim=(-3, 93), yticks=range(0, 91, 15))
    elif column == "accuracy":
        axes.set_ylim(0, 101)
    else:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(min(-4, axes.get_ylim()[0]), max(120, axes.get_ylim()[1]))
        axes.yaxis.set_minor_locator(NullLocator())
        ticks = [-3, -1, 0, 1, 3, 10, 30, 90]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _line(name: str) -> dict:
    rule, source = _source(name)
    color, dash = STYLES[rule]
    return {
        "color": color,
        "linestyle": ON_DATA if source == "data" else dash,
        "marker": MARKERS[rule],
        "markerfacecolor": color if source == "data" else "white",
    }


def _label(name: str) -> str:
    rule, source = _source(name)
    return f"{rule}  {TITLES[rule]}{f', {source}' if source else ''}"


def _source(name: str) -> tuple[str, str]:
    """The rule, and what it reads: "probes", "data", or "" if neither."""
    rule, _, source = name.partition("-")
    return rule, "data" if name == "aa" else source
