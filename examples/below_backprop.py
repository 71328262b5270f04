"""Can a structured feedback weight be cheaper than backprop and as accurate? Its input gradient takes less arithmetic.

    python examples/below_backprop.py            # about half an hour on two cores
    python examples/below_backprop.py --report   # the table and the figure of the runs that are done

In every step, the feedback weight B of each convolution is the projection of W on a structure, scaled to the norm of W.
This is the limit of rules that estimate the weight (sa, kp, and rules that read probes) if B has the structure. The
last layer has B = W. The training is that of depth_study.py, with the settings of backprop, on validation images of
the cluttered digits. ResNets have 8 to 32 channels, plain7 is the network of two_routes.py with 16 to 64.

Time: forward pass and both gradients of the 3x3 convolutions of ResNet-18 (batch 16, float32, channels_last, stride 1),
with the cheapest composition of PyTorch's kernels for the input gradient, relative to backprop, in one thread. "With B"
includes the time to follow the largest singular vectors of W by one step of subspace iteration. That of the other
structures is small: they need no more than a part of W.

Prints the table of docs/below-backprop.md, and writes accuracy.png and accuracy.svg to --out. The finished runs and the
times are kept there in runs.jsonl and times.json.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import depth_study_runs
import torch
from depth_study_runs import Job, Outcome, Runs, Setting
from matplotlib import pyplot as plt
from study_figures import LOOK
from torch import Tensor, nn
from two_routes import Parser, positive

import pyfeedback

FOLDER = Path(__file__).parent.parent / "docs" / "below_backprop"
STRUCTURES = {
    "bp": "W itself: backprop",
    "center": "only the center tap of each kernel",
    "taps": "every kernel is a multiple of one 3x3 pattern",
    "sample:2": "half of the output channels, drawn in each step",
    "groups:2": "two groups of channels",
    "groups:4": "four groups of channels",
    "rank:2": "rank K / 2, for K output channels",
    "rank:4": "rank K / 4",
}
NETWORKS = {  # the width, the number of seeds, and the structures
    "resnet8": (8, 2, tuple(STRUCTURES)),
    "plain7": (16, 2, ("bp", "groups:2", "rank:2", "rank:4")),
    "resnet20": (8, 1, ("bp", "rank:2", "rank:4")),
}
WITH_FEEDBACK = ("rank:2", "rank:4")  # those whose B takes time to compute
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and map of ResNet-18
WEIGHT_DECAY = 0.008  # the choice of depth_study.py for backprop
_convolution_backward = torch.ops.aten.convolution_backward.default


def project(weight: Tensor, structure: str) -> Tensor:
    """The nearest kernel [K, C, R, S] of a structure, for "sample" one that is drawn at random."""
    kind, _, number = structure.partition(":")
    outputs, inputs, *size = weight.shape
    matrix, part = weight.flatten(1), int(number or 1)
    if kind == "center":
        found = torch.zeros_like(weight)
        middle = (..., *(n // 2 for n in size))
        found[middle] = weight[middle]
        return found
    if kind == "taps":
        taps = weight.reshape(outputs * inputs, -1)
        pattern = torch.linalg.eigh(taps.t() @ taps).eigenvectors[:, -1:]
        return (taps @ pattern @ pattern.t()).view_as(weight)
    if kind == "sample":
        found = torch.zeros_like(weight)
        chosen = torch.randperm(outputs)[: outputs // part]
        found[chosen] = weight[chosen]
        return found
    if kind == "groups":
        rows, columns = (torch.arange(n) * part // n for n in (outputs, inputs))
        return weight * (rows[:, None] == columns)[..., None, None]
    if kind == "rank":
        basis = torch.linalg.eigh(matrix @ matrix.t()).eigenvectors[:, -(outputs // part) :]
        return (basis @ (basis.t() @ matrix)).view_as(weight)
    raise ValueError(f"structure is {structure!r}, expected one of {', '.join(STRUCTURES)}")


@torch.no_grad()
def set_feedback(model: nn.Module, structure: str) -> None:
    """Make each B the projection of W, with its norm."""
    for _, layer in pyfeedback.feedback_layers(model):
        found = weight = layer.weight
        if isinstance(layer, nn.Conv2d):
            found = project(weight, structure)
            found = found * (weight.norm() / found.norm())
        layer.feedback.copy_(found)


@dataclass(frozen=True)
class StructuredJob(Job):
    """One network to train with feedback weights of a structure."""

    structure: str = "bp"


class StructuredRuns(Runs):
    """The finished jobs of this study."""

    def submit(self, job):
        return self.pool.submit(train, job, self.root)


def train(job: StructuredJob, root: Path) -> Outcome:
    """Train a new network."""
    if job.structure == "bp":
        return depth_study_runs.train(job, root)
    return depth_study_runs.train(job, root, partial(set_feedback, structure=job.structure))


def jobs(network: str, structure: str) -> list[StructuredJob]:
    """The runs of a structure, one for each seed."""
    width, seeds, structures = NETWORKS[network]
    setting = Setting("bp" if structure == "bp" else "fa", WEIGHT_DECAY)
    options = {"validation": True, "width": width, "structure": structure}
    drawn = range(seeds if structure in structures else 0)
    return [StructuredJob(setting, network, "cluttered", seed, **options) for seed in drawn]


def input_gradient(
    structure: str, dy: Tensor, x: Tensor, kernel: Tensor, with_feedback: bool = False
) -> Callable[[], Tensor]:
    """A function that computes the input gradient of a 3x3 convolution of stride 1 for a B of the structure.

    Args:
        with_feedback: compute B as well; only for "rank".
    """
    kind, _, number = structure.partition(":")
    (k, c, *size), part = kernel.shape, int(number or 1)

    def dgrad(dy: Tensor, kernel: Tensor, groups: int = 1) -> Tensor:
        pad = kernel.shape[-1] // 2
        sizes = (1, 1), (pad, pad), (1, 1), False, (0, 0), groups, (True, False, False)
        return _convolution_backward(dy, x, kernel, None, *sizes)[0]

    if kind == "center":
        return partial(dgrad, dy, kernel[:, :, 1:2, 1:2].contiguous())
    if kind == "taps":
        mixed, pattern = kernel[:, :, :1, :1].contiguous(), kernel[:1, :1].expand(c, 1, 3, 3).contiguous()
        return lambda: dgrad(dgrad(dy, mixed), pattern, c)
    if kind == "sample":
        chosen = torch.arange(0, k, part)
        return lambda: dgrad(dy[:, chosen], kernel[chosen])
    if kind == "groups":
        return partial(dgrad, dy, kernel[:, : c // part].contiguous(memory_format=torch.channels_last), part)
    if kind == "rank":
        matrix = kernel.permute(0, 2, 3, 1).flatten(1)  # [K, 9 C]
        first = torch.linalg.qr(matrix[:, : k // part])[0]

        def factors(basis: Tensor) -> tuple[Tensor, Tensor]:
            rows = (basis.t() @ matrix).view(-1, *size, c).permute(0, 3, 1, 2)
            return basis.t()[..., None, None].contiguous(), rows

        fixed = factors(first)

        def run() -> Tensor:
            basis, rows = fixed
            if with_feedback:
                basis, rows = factors(torch.linalg.qr(matrix @ (matrix.t() @ first))[0])
            return dgrad(torch.conv2d(dy, basis), rows)

        return run
    return partial(dgrad, dy, kernel)


def step_times(seconds: float = 5.0) -> dict[str, float]:
    """The median over the layers of the time of a step, relative to backprop, for each structure."""
    relative: dict[str, list[float]] = {}
    for channels, size in LAYERS:
        drawn = (torch.randn(16, channels, size, size) for _ in range(2))
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in drawn)
        kernel = torch.randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
        dgrads = {structure: input_gradient(structure, dy, x, kernel) for structure in STRUCTURES}
        dgrads |= {f"{name} with B": input_gradient(name, dy, x, kernel, True) for name in WITH_FEEDBACK}
        sizes = (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (False, True, False)
        rounds: dict[str, list[float]] = {structure: [] for structure in dgrads}
        end = time.process_time() + seconds
        while time.process_time() < end or len(rounds["bp"]) < 5:
            for structure, dgrad in dgrads.items():
                begin = time.process_time()
                torch.conv2d(x, kernel, padding=1), _convolution_backward(dy, x, kernel, None, *sizes), dgrad()
                rounds[structure].append(time.process_time() - begin)
        for structure, each in rounds.items():
            ratios = [t / bp for t, bp in zip(each[1:], rounds["bp"][1:], strict=True)]
            relative.setdefault(structure, []).append(statistics.median(ratios))
    return {structure: round(statistics.median(each), 2) for structure, each in relative.items()}


def table(runs: Runs, times: dict[str, float]) -> list[dict]:
    """A row for each structure: its time, and the accuracy and the angle in each network."""
    rows = []
    for structure, meaning in STRUCTURES.items():
        row = {"structure": structure, "meaning": meaning, "time": times[structure]}
        row["time with B"] = times.get(f"{structure} with B", times[structure])
        for network in NETWORKS:
            done = runs.of(jobs(network, structure))
            if done:
                row[network] = statistics.fmean(outcome.accuracy[-1] for outcome in done)
                row[f"{network} angle"] = done[0].angle and statistics.fmean(outcome.angle for outcome in done)
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict]) -> str:
    """The table as text."""
    lines = ["| B | step | with B | " + " | ".join(NETWORKS) + " | angle |", "|" + " --- |" * (len(NETWORKS) + 4)]
    for row in rows:
        reached = " | ".join(f"{row[name]:.1f}" if name in row else "" for name in NETWORKS)
        angles = [row[f"{name} angle"] for name in NETWORKS if row.get(f"{name} angle") is not None]
        angle = " to ".join(dict.fromkeys(f"{f(angles):.0f}°" for f in (min, max))) if angles else ""
        time = f"{row['time']:.2f} | {row['time with B']:.2f}"
        lines.append(f"| {row['meaning']} (`{row['structure']}`) | {time} | {reached} | {angle} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict], path: Path) -> None:
    """Accuracy behind backprop against the time of a step, as PNG and SVG."""
    with plt.rc_context(LOOK | {"svg.hashsalt": "pyfeedback"}):
        figure, axes = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
        for network, marker in zip(NETWORKS, "osD", strict=True):
            mine = [row for row in rows if network in row]
            gaps = [mine[0][network] - row[network] for row in mine]
            axes.plot([row["time with B"] for row in mine], gaps, marker, label=network, alpha=0.8)
        for row in rows:
            axes.annotate(row["structure"], (row["time with B"], -3), ha="center", va="top", rotation=90, fontsize=7)
        axes.axhspan(-1, 1, color="0.9", zorder=0)
        axes.set(xlabel="time of a step with B, relative to backprop", ylabel="behind backprop (points of accuracy)")
        axes.set_ylim(-13, None)
        axes.legend(loc="upper right")
        for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
            figure.savefig(path.with_suffix(suffix), metadata=metadata)
        plt.close(figure)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="train nothing: table and figure of the finished runs")
    parser.add_argument("--workers", type=positive, default=2, help="number of processes; default %(default)s")
    parser.add_argument("--out", type=Path, default=FOLDER, help="output folder; default docs/below_backprop")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    everything = [job for network in NETWORKS for structure in STRUCTURES for job in jobs(network, structure)]
    times = options.out / "times.json"
    with StructuredRuns(options.out / "runs.jsonl", 0 if options.report else options.workers) as runs:
        runs.do("structures", everything)
        if not times.exists():
            torch.set_num_threads(1)
            times.write_text(json.dumps(step_times()) + "\n")
        rows = table(runs, json.loads(times.read_text()))
    draw(rows, options.out / "accuracy")
    print(markdown(rows))


if __name__ == "__main__":
    main()
