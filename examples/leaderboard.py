"""All committed results by network, data and rule, beside published ones: docs/leaderboard.md.

    python examples/leaderboard.py     # trains nothing: reads the runs of depth_study.py

Each cell names the command that trains it again. A finished run is in docs/depth_study/runs.jsonl with all its
settings; remove its line first. The published results of BioTorch have other sizes of networks and data, so the
comparable number is the distance to the same source's backprop.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import depth_study
import depth_study_report
from depth_study_report import Group
from depth_study_runs import Outcome, Runs

PAGE = Path(__file__).parent.parent / "docs" / "leaderboard.md"
COLUMNS = ("rule", "accuracy (%)", "behind bp (points)", "seeds", "time to bp", "command")
DATA = {"cluttered": "cluttered digits", "fashion-mnist": "Fashion-MNIST, 6,000 training images"}


class Published(NamedTuple):
    """Top-1 errors in per cent of another package, by rule."""

    source: str
    network: str
    errors: dict[str, float]


BIOTORCH = "BioTorch, Benchmarks.md, github.com/jsalbert/biotorch"
PUBLISHED = (
    Published(
        BIOTORCH, "LeNet, Fashion-MNIST, 60,000 images",
        {"bp": 9.2, "fa": 13.06, "usf": 9.69, "brsf": 10.02, "frsf": 9.61, "dfa": 12.81},
    ),
    Published(
        BIOTORCH, "ResNet-20, CIFAR-10, SGD",
        {"bp": 8.63, "fa": 32.16, "usf": 10.05, "brsf": 11.02, "frsf": 11.2, "dfa": 45.94},
    ),
    Published(
        BIOTORCH, "ResNet-56, CIFAR-10, SGD",
        {"bp": 8.3, "fa": 34.88, "usf": 8.2, "brsf": 8.69, "frsf": 9.49, "dfa": 38.01},
    ),
)  # fmt: skip


INTRODUCTION = """# Leaderboard

Test accuracy by network, data and rule, made from the committed runs by `python examples/leaderboard.py`. The number
after ± is half of the 95 % interval (Student's t) over seeds. Distances to backprop are taken seed by seed. Time is
processor time relative to backprop with the same seed, the median over the seeds, and includes the evaluation. It was
measured on a busy machine, so it is no more than a hint. [study](study.md) describes networks, training and selection.
"""


def page(results: Mapping[Group, Sequence[Outcome | None]]) -> str:
    """The whole page in Markdown."""
    return "\n".join([INTRODUCTION, *_sections(results), *map(_published, PUBLISHED)])


def _sections(results: Mapping[Group, Sequence[Outcome | None]]) -> Iterator[str]:
    """One table for each network, data set and number of epochs."""
    rows = depth_study_report.rows(results)
    for case in dict.fromkeys(map(depth_study_report.case, rows)):
        network, data, epochs = case
        lines = [COLUMNS, ["---"] * len(COLUMNS)]
        for row in [row for row in rows if depth_study_report.case(row) == case]:
            group = Group(network, data, row["rule"], epochs)
            command = " ".join(f"--{name} {value}" for name, value in group._asdict().items())
            time = _time(results[group], results.get(group._replace(rule="bp"), ()))
            lines.append([
                group.rule, _interval(row, "accuracy"), _interval(row, "behind bp"), str(row["accuracy seeds"]), time,
                f"`python examples/depth_study.py {command}`",
            ])  # fmt: skip
        yield f"## {depth_study_report.title(network, 'cluttered', epochs)}, {DATA[data]}\n\n{_table(lines)}"


def _interval(row: Mapping, column: str) -> str:
    if not row[f"{column} seeds"]:
        return ""
    half = row[f"{column} interval"]
    return f"{row[column]:.1f}" + ("" if half == "" else f" ± {half:.1f}")


def _time(outcomes: Sequence[Outcome | None], bp: Sequence[Outcome | None]) -> str:
    pairs = zip(outcomes, bp, strict=False)
    ratios = [mine.seconds / theirs.seconds for mine, theirs in pairs if mine and theirs and not mine.diverged]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def _published(found: Published) -> str:
    lines = [["rule", "accuracy (%)", "behind bp (points)"], ["---"] * 3]
    for name, error in found.errors.items():
        lines.append([name, f"{100 - error:.1f}", "" if name == "bp" else f"{error - found.errors['bp']:.1f}"])
    return f"## {found.network}\n\nPublished by {found.source}.\n\n{_table(lines)}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    scale = depth_study.Scale()
    with Runs(depth_study.FOLDER / "runs.jsonl") as runs:
        results = depth_study.results(scale, runs, depth_study.search(scale, runs))
    PAGE.write_text(page(results))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
