"""Alignment over time: read every n training steps, saved as CSV, plotted as a figure."""

import csv
import math
from collections.abc import Callable
from dataclasses import astuple, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pyfeedback.core.values import check_int, describe
from pyfeedback.metrics.alignment import LayerAlignment, alignment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = tuple(field.name for field in fields(LayerAlignment))


class Monitor:
    """Reads the alignment of a model as it trains.

        monitor = pyfeedback.Monitor(model, every=100)
        for x, target in data:
            ...  # a training step
            monitor.step()
        monitor.save("alignment.csv"), monitor.draw("alignment.png")

    A reading takes one pass over the weights (:func:`pyfeedback.alignment`); a step without a reading only increments a
    counter. With DistributedDataParallel, monitor the inner module on a single rank.

    Args:
        model: a model with feedback layers.
        every: number of steps between readings. The first reading is made immediately, at step 0.
        batch, loss: as for :func:`pyfeedback.alignment`, for the projection and gradient angles; a loss alone runs the
            model itself. A reading then costs two training steps more.
        writer: gets each reading as well, under names such as ``angle/conv1``: a SummaryWriter of TensorBoard or
            another object with ``add_scalar(name, value, step)``, or a run of W&B or another object with
            ``log(values, step=step)``.

    Attributes:
        readings: the results of :func:`pyfeedback.alignment` by step; empty for a model that learns by backprop.

    Raises:
        ValueError: ``every`` is below 1, or ``batch`` is given without ``loss``.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        batch: tuple | None = None,
        loss: Callable[..., Tensor] | None = None,
        writer: Any = None,
    ):
        check_int("every", every, least=1)
        if writer is not None and not hasattr(writer, "add_scalar") and not hasattr(writer, "log"):
            raise TypeError(f"writer is {describe(writer)}, expected an object with add_scalar or log")
        self.writer = writer
        self.model, self.every, self.batch, self.loss = model, every, batch, loss
        self.readings: dict[int, dict[str, LayerAlignment]] = {}
        self._last = 0
        self._read()

    def step(self) -> dict[str, LayerAlignment] | None:
        """Advance by one training step, and return the reading if one is due."""
        self._last += 1
        return self._read() if self._last % self.every == 0 else None

    @property
    def latest(self) -> dict[str, LayerAlignment]:
        """The last reading; empty if there is none."""
        return next(reversed(self.readings.values()), {})

    def save(self, path: str | Path) -> None:
        """Write the readings as CSV: one row per step and layer, with the fields of LayerAlignment."""
        with open(path, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["step", "layer", *COLUMNS])
            rows.writerows(self._rows())

    def load(self, path: str | Path) -> None:
        """Load the readings of a file, and continue after the last of them.

        Raises:
            ValueError: the columns of the file are not those of :meth:`save`.
        """
        with open(path, newline="") as file:
            columns, *rows = csv.reader(file)
        if columns != ["step", "layer", *COLUMNS]:
            raise ValueError(f"{path} has columns {','.join(columns)}, expected step,layer,{','.join(COLUMNS)}")
        found = [(int(step), layer, *(float(v) if v else None for v in values)) for step, layer, *values in rows]
        self.load_state_dict({"step": int(rows[-1][0]) if rows else 0, "readings": found})

    def state_dict(self) -> dict:
        """Return the step and the readings, as numbers and strings."""
        return {"step": self._last, "readings": self._rows()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a :meth:`state_dict`.

        Raises:
            ValueError: ``state`` is not a state_dict of a monitor.
        """
        readings: dict[int, dict[str, LayerAlignment]] = {}
        try:
            last = state["step"]
            for step, layer, *values in state["readings"]:
                readings.setdefault(step, {})[layer] = LayerAlignment(*values)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"state is {describe(state)}, expected what state_dict returned") from None
        self._last, self.readings = last, readings

    def draw(self, path: str | Path | None = None) -> "Figure":
        """Plot the readings as a matplotlib Figure, and save it to ``path`` if given.

        There is a panel for each metric and a line for each layer, dark near the input and light near the output. With
        more than 24 layers, each is a row of a heatmap. Scale growth is the norm of W relative to the first reading.

        Raises:
            ValueError: there are no readings, as for a model that learns by backprop.
        """
        if not self.readings:
            raise ValueError("model has no feedback layer, expected a model converted to a rule other than bp")
        figure = _figure(self.readings)
        if path is not None:
            figure.savefig(path)
        return figure

    def _read(self) -> dict[str, LayerAlignment]:
        found = alignment(self.model, self.batch, self.loss)
        if found:
            self.readings[self._last] = found
            if self.writer is not None:
                _write(self.writer, found, self._last)
        return found

    def _rows(self) -> list[tuple]:
        return [(step, layer, *astuple(a)) for step, found in self.readings.items() for layer, a in found.items()]


def _write(writer: Any, found: dict[str, LayerAlignment], step: int) -> None:
    pairs = ((f"{name}/{layer}", v) for layer, a in found.items() for name, v in zip(COLUMNS, astuple(a), strict=True))
    values = {name: value for name, value in pairs if value is not None and not math.isnan(value)}
    if not hasattr(writer, "add_scalar"):
        writer.log(values, step=step)
        return
    for name, value in values.items():
        writer.add_scalar(name, value, step)


def _growth(now: LayerAlignment, first: LayerAlignment) -> float:
    return now.weight_norm / first.weight_norm if first.weight_norm else math.nan


PANELS: dict[str, Callable[[LayerAlignment, LayerAlignment], float | None]] = {
    "angle of B to W (degrees)": lambda now, first: now.angle,
    "norm ratio |B| / |W|": lambda now, first: now.norm_ratio,
    "scale growth of |W|": _growth,
    "projection angle (degrees)": lambda now, first: now.projection_angle,
    "gradient angle to backprop (degrees)": lambda now, first: now.gradient_angle,
}
NAMED = 8  # the most layers that a legend lists; for more, a color bar names the first and the last
LINES = 24  # the most layers that are drawn as lines; more are rows of a heatmap


def _figure(readings: dict[int, dict[str, LayerAlignment]]) -> "Figure":
    import matplotlib
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    first = next(iter(readings.values()))
    values: dict[str, dict[str, list]] = {
        title: {layer: [panel(found[layer], first[layer]) for found in readings.values()] for layer in first}
        for title, panel in PANELS.items()
    }
    shown = {title: lines for title, lines in values.items() if any(v is not None for v in chain(*lines.values()))}
    depth = ScalarMappable(Normalize(0, max(1, len(first) - 1) / 0.9), "viridis")  # its yellow end is hard to see
    colors = depth.to_rgba(np.arange(len(first)))
    rows, columns = -(-len(shown) // 3), min(3, len(shown))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(2.9 * columns + 0.8, 2.7 * rows), dpi=200, layout="constrained")
        for cell, (title, lines) in enumerate(shown.items(), 1):
            axes = figure.add_subplot(rows, columns, cell, title=title, xlabel="step")
            if len(first) > LINES:
                _draw_heatmap(figure, axes, list(readings), lines)
                continue
            for color, (layer, line) in zip(colors, lines.items(), strict=True):
                axes.plot(list(readings), line, color=color, linewidth=1.3, label=layer)
            axes.grid(color="#e6e6e6", linewidth=0.6)
            if "degrees" in title:
                axes.set(yticks=range(0, 181, 30), ylim=(0, max(95, axes.get_ylim()[1])))
        if len(first) > LINES:
            return figure
        if len(first) <= NAMED:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, title="layer")
        else:
            ends = [0, len(first) - 1]
            bar = figure.colorbar(depth, ax=figure.axes, ticks=ends, boundaries=range(len(first)), label="layer")
            bar.set_ticklabels([list(first)[end] for end in ends])
    return figure


def _draw_heatmap(figure: "Figure", axes: Any, steps: list[int], lines: dict[str, list]) -> None:
    """Draw a row for each layer, the first on top, and a column for each reading."""
    import numpy as np

    grid = np.array([[math.nan if value is None else value for value in line] for line in lines.values()])
    if len(steps) == 1:
        steps, grid = [steps[0], steps[0] + 1], np.repeat(grid, 2, axis=1)
    angles = "degrees" in axes.get_title()
    limits = {"vmin": 0, "vmax": 90} if angles else {}
    image = axes.pcolormesh(steps, np.arange(len(grid)), grid, shading="nearest", rasterized=True, **limits)
    first, *_, last = lines
    axes.set_yticks([0, len(grid) - 1], [first, last])
    axes.invert_yaxis()
    figure.colorbar(image, ax=axes, extend="max" if angles else "neither")
