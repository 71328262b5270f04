"""The figure of two_routes.py: test accuracy and alignment by epoch, side by side."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

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
    accuracy: dict[str, Sequence[float]],
    angles: dict[str, Sequence[float]],
    titles: dict[str, str],
    path: Path,
) -> None:
    """Draw a curve for each rule; the first point is before training. bp has no feedback weight and no angles."""
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


def _curves(axes, curves: dict[str, Sequence[float]]) -> None:
    """One line for each rule, labeled at its end. Labels that would overlap are moved apart."""
    curves = {name: [value for value in curve if isfinite(value)] for name, curve in curves.items()}
    curves = {name: curve for name, curve in curves.items() if curve}
    for name, curve in curves.items():
        color, dash = STYLES[name]
        axes.plot(range(len(curve)), curve, color=color, linestyle=dash, linewidth=1.7)
    last = max((len(curve) - 1 for curve in curves.values()), default=1)
    axes.set_xlim(0, last)
    axes.xaxis.get_major_locator().set_params(integer=True)
    ends = sorted((curve[-1], name) for name, curve in curves.items())
    for (value, name), height in zip(ends, _apart([value for value, _ in ends]), strict=True):
        at = len(curves[name]) - 1
        color = STYLES[name][0]
        axes.annotate(
            name, (at, value), (at + 0.05 * last, height), color=color, va="center", fontsize=8.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


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
