"""The figure of two_routes.py: test accuracy and alignment by epoch, side by side."""

from collections.abc import Sequence
from itertools import zip_longest
from math import isfinite, nan
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# The color-blind safe palette of Okabe and Ito. The dash pattern marks the route of a rule.
REFERENCE, LOCAL, ESTIMATION, SIGNS = (0, (1, 1.2)), "-", (0, (4, 1.5)), (0, (4, 1.2, 1, 1.2))
STYLES = {
    "bp": ("#000000", REFERENCE),
    "fa": ("#808080", REFERENCE),
    "wm": ("#D55E00", LOCAL),
    "ia": ("#0072B2", LOCAL),
    "sa": ("#009E73", ESTIMATION),
    "aa": ("#E69F00", ESTIMATION),
    "kp": ("#CC79A7", ESTIMATION),
    "oja": ("#56B4E9", LOCAL),
    "usf": ("#B2182B", SIGNS),
    "frsf": ("#7A4419", SIGNS),
    "brsf": ("#5E3C99", SIGNS),
    "pfa": ("#8C9900", ESTIMATION),
    "dfa": ("#404040", REFERENCE),
}
ROUTES = {REFERENCE: "reference", LOCAL: "local rules", ESTIMATION: "weight estimation", SIGNS: "sign-symmetry"}


def draw(
    accuracy: dict[str, Sequence[Sequence[float]]],
    angles: dict[str, Sequence[Sequence[float]]],
    titles: dict[str, str],
    path: Path,
) -> None:
    """Draw the curves of each rule, one for each seed: a line for their mean, and a band for their range.

    The first point of a curve is before training. bp has no feedback weight and no angles.
    """
    look = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 200}
    with plt.rc_context(look):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 4.0), layout="constrained")
        _curves(left, accuracy)
        left.set(ylabel="test accuracy (%)", ylim=(0, 101))
        left.axhline(10, color="#bbbbbb", linewidth=0.8, zorder=0)
        left.text(0.99, 9, "chance", color="#808080", ha="right", va="top", transform=left.get_yaxis_transform())
        _curves(right, angles)
        right.set(ylabel="angle of feedback to weight (degrees)", ylim=(0, 101), yticks=range(0, 91, 15))
        right.axhline(90, color="#bbbbbb", linewidth=0.8, zorder=0)
        right.text(0.99, 91, "orthogonal", color="#808080", ha="right", transform=right.get_yaxis_transform())
        for axes, letter in zip((left, right), "ab", strict=True):
            axes.set_xlabel("epoch")
            axes.set_title(letter, loc="left", fontweight="bold")
        _legend(figure, left, accuracy, titles)
        figure.savefig(path)
        plt.close(figure)


def _curves(axes, curves: dict[str, Sequence[Sequence[float]]]) -> None:
    """A line and a band for each rule, labeled at the end of the line. Labels that would overlap are moved apart."""
    spreads = {name: spread for name, runs in curves.items() if (spread := _spread(runs))}
    for name, spread in spreads.items():
        color, dash = STYLES[name]
        low, mean, high = zip(*spread, strict=True)
        axes.plot(range(len(mean)), mean, color=color, linestyle=dash, linewidth=1.7)
        axes.fill_between(range(len(mean)), low, high, color=color, alpha=0.15, linewidth=0)
    last = max((len(spread) - 1 for spread in spreads.values()), default=1)
    axes.set_xlim(0, last)
    axes.xaxis.get_major_locator().set_params(integer=True)
    ends = sorted((spread[-1].mean, name) for name, spread in spreads.items())
    for (value, name), height in zip(ends, _apart([value for value, _ in ends]), strict=True):
        at = len(spreads[name]) - 1
        color = STYLES[name][0]
        axes.annotate(
            name, (at, value), (at + 0.05 * last, height), color=color, va="center", fontsize=8.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


class Spread(NamedTuple):
    """The values of all seeds after one epoch."""

    low: float
    mean: float
    high: float


def _spread(runs: Sequence[Sequence[float]]) -> list[Spread]:
    """By epoch, over the runs that reached it with a finite value."""
    found = []
    for values in zip_longest(*runs, fillvalue=nan):
        if known := [value for value in values if isfinite(value)]:
            found.append(Spread(min(known), fmean(known), max(known)))
    return found


def _apart(heights: list[float], gap: float = 4.8, top: float = 107.0) -> list[float]:
    """Increasing heights at least ``gap`` apart and at most ``top``: one pass up, then one pass down."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    limit = top
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


def _legend(figure, axes, curves, titles: dict[str, str]) -> None:
    """The legend below both panels, with one column for each route."""
    shown = {}
    for route, heading in ROUTES.items():
        names = [name for name in curves if STYLES[name][1] == route]
        if names:
            shown[heading] = names
    rows = max(map(len, shown.values()))
    handles, labels = [], []
    for heading, names in shown.items():
        handles.append(plt.Line2D([], [], linewidth=0))
        labels.append(heading)
        for name in names:
            color, dash = STYLES[name]
            handles.append(plt.Line2D([], [], color=color, linestyle=dash, linewidth=1.7))
            labels.append(f"{name}  {titles[name]}")
        blank = rows - len(names)
        handles += [plt.Line2D([], [], linewidth=0)] * blank
        labels += [""] * blank
    figure.legend(
        handles, labels, ncols=len(shown), loc="outside lower center", frameon=False, fontsize=8, handlelength=2.6
    )
