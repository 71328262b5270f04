"""The figures of study.py. A rule has its color and dash from demo_figure.py, and a marker for print in gray."""

from collections.abc import Callable, Sequence
from pathlib import Path

from demo_figure import STYLES
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, NullLocator
from two_routes import TITLES

MARKERS = {"bp": "o", "fa": "X", "wm": "v", "ia": "^", "oja": "<", "sa": "s", "aa": "D", "kp": "P"}
LOOK = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 200,
    "lines.linewidth": 1.5, "lines.markersize": 5, "errorbar.capsize": 2, "legend.frameon": False,
}  # fmt: skip
ACCURACY, ANGLE = "test accuracy (%)", "angle of feedback to weight (degrees)"
BEHIND = "behind backprop (points of accuracy)"
SCALES = {ACCURACY: {"ylim": (0, 101)}, ANGLE: {"ylim": (-3, 93), "yticks": range(0, 91, 15)}}


def search(reached: dict[str, Sequence[float]], fa: float, bp: float, layers: int, path: Path) -> None:
    """The share of a rule's settings that reaches an accuracy. A steep early fall means that the rule needs tuning."""

    def panel(axes: Axes) -> None:
        for name, values in reached.items():
            share = [100 * i / len(values) for i in range(1, len(values) + 1)]
            marks = list(range(1, len(values) + 1, 2))
            axes.step([100, *values, 0], [0, *share, 100], where="post", markevery=marks, **_line(name))
        for value, name in ((fa, "fa"), (bp, "bp")):
            axes.axvline(value, color=STYLES[name][0], linestyle=STYLES[name][1], linewidth=1, zorder=0)
            axes.text(value, 101, name, ha="center", va="bottom", color=STYLES[name][0])
        axes.set(xlabel=f"validation accuracy (%), {layers} layers", xlim=(0, 100), ylim=(0, 101))
        axes.set_ylabel("settings that reach it (%)")

    _save(path, [panel], list(reached))


def transfer(rows: list[dict], path: Path) -> None:
    """A curve for each of the best settings of the shallow network; the best one is thick."""

    def panel(axes: Axes) -> None:
        for name in _rules(rows):
            mine = [row for row in rows if row["rule"] == name]
            ranks = [column for column in mine[0] if column.startswith("behind")]
            for width, rank in zip((2, *[0.8] * len(ranks)), ranks, strict=False):
                line = _line(name) | {"linewidth": width, "markersize": 4 + width}
                axes.plot([row["layers"] for row in mine], [row[rank] for row in mine], **line)
        axes.axhline(0, **_reference("bp"))
        axes.set(xlabel="layers with weights", ylabel=BEHIND)
        _ticks(axes.xaxis, sorted({row["layers"] for row in rows}))

    _save(path, [panel], _rules(rows))


def depth(rows: list[dict], path: Path) -> None:
    def panel(column: str, label: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            _series(axes, rows, "layers", column, apart=0.12)
            axes.set(xlabel="layers with weights", ylabel=label, **SCALES.get(label, {}))
            _ticks(axes.xaxis, sorted({row["layers"] for row in rows}))

        return draw

    def gap(axes: Axes) -> None:
        """The gap in points, on a scale that is linear up to one point and logarithmic beyond."""
        axes.axhline(0, **_reference("bp"))
        axes.set_yscale("symlog", linthresh=1)
        panel("behind bp (points)", BEHIND)(axes)
        _ticks(axes.yaxis, [-1, 0, 1, 3, 10, 30, 90])

    _save(path, [panel("accuracy (%)", ACCURACY), gap, panel("angle (degrees)", ANGLE)], _rules(rows))


def noise(rows: list[dict], layers: int, path: Path) -> None:
    levels = sorted({row["noise"] for row in rows})
    none = levels[1] / 10**0.75  # the position of 0 on a logarithmic axis
    rows = [row | {"noise": row["noise"] or none} for row in rows]
    swept = [row for row in rows if row["rule"] not in ("bp", "fa")]

    def panel(column: str, label: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            _levels(axes, rows, column)
            _series(axes, swept, "noise", column, factor=1.04)
            axes.set(xscale="log", ylabel=label, **SCALES.get(label, {}))
            axes.set_xlabel(f"noise in each gradient of B (std), {layers} layers")
            _ticks(axes.xaxis, [none, *levels[1:]], ["0", *(f"{level:g}" for level in levels[1:])])

        return draw

    _save(path, [panel("accuracy (%)", ACCURACY), panel("angle (degrees)", ANGLE)], _rules(rows))


def samples(rows: list[dict], layers: int, path: Path) -> None:
    swept = [row for row in rows if row["samples"]]
    counts = sorted({row["samples"] for row in swept})

    def panel(column: str, label: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            _levels(axes, rows, column)
            _series(axes, swept, "samples", column, factor=1.02)
            axes.set(xscale="log", ylabel=label, **SCALES.get(label, {}))
            axes.set_xlabel(f"images of {counts[-1]} that B learns from, {layers} layers")
            _ticks(axes.xaxis, counts)

        return draw

    _save(path, [panel("accuracy (%)", ACCURACY), panel("angle (degrees)", ANGLE)], _rules(rows))


def cost(rows: list[dict], path: Path) -> None:
    def panel(axes: Axes) -> None:
        for i, row in enumerate(rows):
            name, _, part = row["rule"].partition(", ")
            axes.barh(i, row["relative to bp"], color="white" if part else STYLES[name][0], edgecolor=STYLES[name][0])
            axes.text(row["relative to bp"] + 0.02, i, f"{row['relative to bp']:.2f}", va="center", fontsize=8)
        axes.axvline(1, **_reference("bp"))
        axes.set_yticks(range(len(rows)), [row["rule"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("time of a training step, relative to backprop")

    _save(path, [panel], [])


def _rules(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["rule"] for row in rows))


def _line(name: str) -> dict:
    color, dash = STYLES[name]
    return {"color": color, "linestyle": dash, "marker": MARKERS[name], "markerfacecolor": "white"}


def _reference(name: str) -> dict:
    color, dash = STYLES[name]
    return {"color": color, "linestyle": dash, "linewidth": 1, "zorder": 0}


def _series(axes: Axes, rows: list[dict], x: str, y: str, apart: float = 0, factor: float = 1) -> None:
    """A curve with error bars for each rule, slightly offset so that all error bars are visible."""
    names = _rules(rows)
    for i, name in enumerate(names):
        place = i - (len(names) - 1) / 2
        mine = [row for row in rows if row["rule"] == name and row[y] != ""]
        if name == "bp" and y.startswith("behind"):
            continue
        at = [row[x] * factor**place + apart * place for row in mine]
        axes.errorbar(at, [row[y] for row in mine], [row[f"{y} std"] for row in mine], elinewidth=1, **_line(name))


def _levels(axes: Axes, rows: list[dict], column: str) -> None:
    """Horizontal lines for backprop and feedback alignment, which do not depend on the x axis."""
    for row in rows:
        if row["rule"] in ("bp", "fa") and row[column] != "":
            mean, deviation = row[column], row[f"{column} std"]
            axes.axhline(mean, **_reference(row["rule"]))
            axes.axhspan(mean - deviation, mean + deviation, color=STYLES[row["rule"]][0], alpha=0.1, linewidth=0)


def _ticks(axis: Axis, places: Sequence[float], labels: Sequence[str] | None = None) -> None:
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(FixedLocator(places))
    axis.set_ticklabels(labels or [f"{place:g}" for place in places])


def _save(path: Path, panels: Sequence[Callable[[Axes], None]], rules: Sequence[str]) -> None:
    """The panels side by side, lettered if there are several, above one legend of the rules."""
    with plt.rc_context(LOOK):
        width = 4.6 if len(panels) == 1 else 3.3 * len(panels)
        figure, found = plt.subplots(1, len(panels), figsize=(width, 3.5), layout="constrained", squeeze=False)
        for axes, panel, letter in zip(found[0], panels, "abc", strict=False):
            panel(axes)
            if len(panels) > 1:
                axes.set_title(letter, loc="left", fontweight="bold")
        handles = [plt.Line2D([], [], label=f"{name}  {TITLES[name]}", **_line(name)) for name in rules]
        if handles:
            figure.legend(
                handles=handles, loc="outside lower center", ncols=len(panels) + 1, fontsize=8, handlelength=3
            )
        figure.savefig(path)
        plt.close(figure)
