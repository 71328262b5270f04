"""The figures of study.py. A rule has its colour and dash of picture.py, and a marker, so that grey print reads too."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from picture import LOCAL
from picture import STYLES as DEMO_STYLES
from two_routes import TITLES as DEMO_TITLES

STYLES = DEMO_STYLES | {"oja": ("#56B4E9", LOCAL)}
TITLES = DEMO_TITLES | {"oja": "Oja's rule"}
MARKERS = {"bp": "o", "fa": "X", "wm": "v", "ia": "^", "oja": "<", "sa": "s", "aa": "D", "kp": "P"}
LOOK = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 200,
    "lines.linewidth": 1.5, "lines.markersize": 5, "errorbar.capsize": 2, "legend.frameon": False,
}  # fmt: skip
CHANCE = 10
ACCURACY, ANGLE = "test accuracy (%)", "angle of feedback to weight (degrees)"
BEHIND = "behind backprop (points of accuracy)"


def search(reached: dict[str, Sequence[float]], fa: float, bp: float, layers: int, path: Path) -> None:
    """How large a share of a rule's settings reaches an accuracy; a steep early fall is a rule that needs tuning."""

    def panel(axes: Axes) -> None:
        for name, values in reached.items():
            share = [100 * i / len(values) for i in range(1, len(values) + 1)]
            axes.step([100, *values, 0], [0, *share, 100], where="post", **_line(name), markevery=(1, 3))
        for value, name in ((fa, "fa"), (bp, "bp")):
            axes.axvline(value, color=STYLES[name][0], linestyle=STYLES[name][1], linewidth=1, zorder=0)
            axes.text(value, 101, name, ha="center", va="bottom", color=STYLES[name][0])
        axes.set(xlabel=f"validation accuracy (%), {layers} layers", xlim=(0, 100), ylim=(0, 101))
        axes.set_ylabel("settings that reach it (%)")

    _save(path, [panel], list(reached))


def transfer(rows: list[dict], path: Path) -> None:
    """Each of the best settings of the shallow network; their mean is the thick line."""

    def panel(axes: Axes) -> None:
        for name in dict.fromkeys(row["rule"] for row in rows):
            mine = [row for row in rows if row["rule"] == name]
            depths = [row["layers"] for row in mine]
            ranks = [column for column in mine[0] if column.startswith("behind")]
            for rank in ranks:
                axes.plot(depths, [row[rank] for row in mine], **_line(name) | {"linewidth": 0.6, "markersize": 2.5})
            axes.plot(depths, [row["over the ranks"] for row in mine], **_line(name) | {"linewidth": 2.5})
        axes.axhline(0, **_reference("bp"))
        axes.set(xlabel="layers with weights", ylabel=BEHIND)
        _ticks(axes, sorted({row["layers"] for row in rows}))

    _save(path, [panel], list(dict.fromkeys(row["rule"] for row in rows)))


def depth(rows: list[dict], path: Path) -> None:
    def panel(column: str, label: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            _series(axes, rows, "layers", column, apart=0.15)
            axes.set(xlabel="layers with weights", ylabel=label)
            _ticks(axes, sorted({row["layers"] for row in rows}))

        return draw

    panels = [panel("accuracy (%)", ACCURACY), panel("behind bp (points)", BEHIND), panel("angle (degrees)", ANGLE)]
    _save(path, panels, _rules(rows))


def noise(rows: list[dict], layers: int, path: Path) -> None:
    levels = sorted({row["noise"] for row in rows})
    none = levels[1] / 10**0.75  # where a logarithmic axis shows 0
    rows = [row | {"noise": row["noise"] or none} for row in rows]
    swept = [row for row in rows if row["rule"] not in ("bp", "fa")]

    def panel(column: str, label: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            _levels(axes, rows, column)
            _series(axes, swept, "noise", column, factor=1.04)
            axes.set(xscale="log", ylabel=label)
            axes.set_xlabel(f"standard deviation of the noise, {layers} layers")
            _ticks(axes, [none, *levels[1:]], ["0", *(f"{level:g}" for level in levels[1:])])

        return draw

    _save(path, [panel("accuracy (%)", ACCURACY), panel("angle (degrees)", ANGLE)], _rules(rows))


def samples(rows: list[dict], layers: int, path: Path) -> None:
    swept = [row for row in rows if row["samples"]]
    counts = sorted({row["samples"] for row in swept})

    def panel(column: str, label: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            _levels(axes, rows, column)
            _series(axes, swept, "samples", column, factor=1.02)
            axes.set(xscale="log", ylabel=label)
            axes.set_xlabel(f"images of a batch of {counts[-1]} that B learns from, {layers} layers")
            _ticks(axes, counts)

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
    """A curve with error bars for each rule, drawn a little beside each other so that all error bars are seen."""
    names = _rules(rows)
    for i, name in enumerate(names):
        place = i - (len(names) - 1) / 2
        mine = [row for row in rows if row["rule"] == name and row[y] != ""]
        at = [row[x] * factor**place + apart * place for row in mine]
        axes.errorbar(at, [row[y] for row in mine], [row[f"{y} std"] for row in mine], elinewidth=1, **_line(name))


def _levels(axes: Axes, rows: list[dict], column: str) -> None:
    """Backprop and feedback alignment, which the horizontal axis does not move."""
    for row in rows:
        if row["rule"] in ("bp", "fa") and row[column] != "":
            mean, deviation = row[column], row[f"{column} std"]
            axes.axhline(mean, **_reference(row["rule"]))
            axes.axhspan(mean - deviation, mean + deviation, color=STYLES[row["rule"]][0], alpha=0.1, linewidth=0)


def _ticks(axes: Axes, places: Sequence[float], labels: Sequence[str] | None = None) -> None:
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.set_xticklabels(labels or [f"{place:g}" for place in places])


def _save(path: Path, panels: Sequence[Callable[[Axes], None]], rules: Sequence[str]) -> None:
    """The panels side by side, lettered where there are several, over one legend of the rules."""
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
