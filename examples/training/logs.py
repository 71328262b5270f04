"""The log files of a run, and its progress on the terminal."""

import csv
import time
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from training.checkpoint import replacing
from training.loop import Run

DRAWING = 30.0  # seconds between two drawings of the picture, which takes about half a second


class Logs:
    """Writes metrics.csv, alignment.csv and alignment.png of a run, and optionally TensorBoard events.

    The files are always written from the state of the run, so a resumed run produces the same files.
    """

    def __init__(self, run: Run, folder: Path, tensorboard: bool = False):
        self.run, self.folder = run, folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(run.settings.to_json() + "\n")
        self.board = _tensorboard(folder, run.steps) if tensorboard else None
        run.monitor.writer = self.board
        total = run.settings.epochs * run.loader.steps
        # disable=None: the bar is shown on a terminal only.
        self.bar = tqdm(initial=run.steps, total=total, unit="step", dynamic_ncols=True, disable=None)
        self._drawn = time.monotonic()

    def after_step(self) -> None:
        """Show a step, and the moving averages when the alignment is read."""
        self.bar.update()
        if self.run.steps % self.run.settings.every == 0:
            loss, accuracy = self.run.average.read()
            self.bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1f} %")
            self._show({"moving/loss": loss, "moving/accuracy": accuracy})

    def after_epoch(self) -> None:
        """Write and show the results of an epoch."""
        row = self.run.rows[-1]
        _write_csv(self.folder / "metrics.csv", self.run.rows)
        self.run.monitor.save(self.folder / "alignment.csv")
        if time.monotonic() - self._drawn > DRAWING:
            self.draw()
        self._show({name: value for name, value in row.items() if name not in ("epoch", "step")})
        _say(_line(row, self.run.settings.epochs))

    def draw(self) -> None:
        """Draw the alignment so far, if matplotlib is installed and there are readings."""
        self._drawn = time.monotonic()
        if self.run.monitor.readings:
            with suppress(ImportError):
                self.run.monitor.draw(self.folder / "alignment.png")

    def close(self) -> None:
        """Report the end of the run; finish the picture, the progress bar and the events."""
        self.draw()
        _say(f"{'diverged' if self.run.diverged else 'done'}: see {self.folder}")
        self.bar.close()
        if self.board:
            self.board.close()

    def _show(self, values: dict[str, float | None]) -> None:
        if self.board:
            for name, value in values.items():
                if value is not None:
                    self.board.add_scalar(name, value, self.run.steps)
            self.board.flush()


def _say(line: str) -> None:
    """Print a line, above the progress bar if there is one."""
    with tqdm.external_write_mode():
        print(line, flush=True)


def _line(row: dict, epochs: int) -> str:
    shown = {
        "train": f"{row['train_loss']:.3f} {row['train_accuracy']:5.1f} %",
        "test": f"{row['test_loss']:.3f} {row['test_accuracy']:5.1f} %",
        "frozen": row["frozen_accuracy"] is not None and f"{row['frozen_accuracy']:5.1f} %",
        "angle": row["angle"] is not None and f"{row['angle']:3.0f}",
        "|B|/|W|": row["norm_ratio"] is not None and f"{row['norm_ratio']:.2f}",
        "growth": f"{row['growth']:.2f}",
    }
    words = [f"{name} {value}" for name, value in shown.items() if value]
    return f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}  {'  '.join(words)}  {row['seconds']:.1f} s"


def _write_csv(path: Path, rows: list[dict]) -> None:
    with replacing(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def _tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"tensorboard is True, expected it to be installed: {error}") from None
    return SummaryWriter(folder, purge_step=step or None)
