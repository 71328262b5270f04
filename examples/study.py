"""The findings of "Two Routes to Scalable Credit Assignment without Weight Symmetry", tested on cluttered digits.

    python examples/study.py             # two processes, under half an hour; figures and tables in ./study
    python examples/study.py --quick     # a small version in under three minutes: it shows that the study runs

(a) Sensitivity: how many random settings of a rule train a shallow network, and how the best ones do in deeper ones.
(b) Depth: the gap of each rule to backprop as the network gets deeper.
(c) Noise: weight estimation with noise added to every gradient of the feedback weights.
(d) Samples: accuracy and angle when the feedback learns from a part of each batch, and the cost of each rule.

The search of (a) chooses the settings on digits held out from the training digits. Everything else is measured on the
test digits. The data, network and training loop are those of two_routes.py; the rules have the coefficients of the
paper, which have units. Each finished run is appended to runs.jsonl, so an interrupted study resumes when it is started
again. Source: Kunin et al., ICML 2020.
"""

import argparse
import csv
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cluttered_digits
import study_figures
import torch
from study_runs import Job, Runs, build
from torch.nn import functional as F
from tuned import LR, MOMENTUM, WITH_UNITS, Setting
from two_routes import BATCH, Parser

import pyfeedback

# The ranges of the search of (a), on a logarithmic scale, the same for the two local rules. oja is ia with null = amp,
# which leaves one coefficient less.
DRIVE, DECAY = (0.003, 3.0), (0.003, 0.1)
BOXES: dict[str, dict[str, tuple[float, float]]] = {
    "wm": {"amp": DRIVE, "decay": DECAY},
    "ia": {"amp": DRIVE, "decay": DECAY, "null": DRIVE},
    "oja": {"amp": DRIVE, "decay": DECAY},
    "sa": {"self_": (0.3, 10.0), "decay": (0.3, 10.0)},
    "aa": {"amp": (0.3, 3.0), "sparse": (0.3, 3.0)},
    "kp": {"decay": (0.001, 0.01)},
}
LOCAL, ESTIMATION = ("wm", "ia", "oja"), ("sa", "aa", "kp")
RULES = ("bp", "fa", *LOCAL, *ESTIMATION)
WEIGHT_DECAYS = (0.002, 0.004, 0.008)  # of the forward weights; the best for backprop is used
KEPT = 2  # settings of a local rule that are tried in deeper networks
SAMPLED = ("ia", "aa")  # a local rule and a weight-estimation rule, both of which read activations

Settings = dict[str, list[Setting]]  # by rule, best first


@dataclass(frozen=True)
class Scale:
    """The size of a study. ``repeats`` are those of tuned.network; the first is the shallow network."""

    search: int = 12  # settings of a local rule; weight estimation gets half as many
    seeds: int = 3
    epochs: int = 8
    width: int = 8
    repeats: tuple[int, ...] = (1, 2, 3)
    noise: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    samples: tuple[int, ...] = (2, 4, 8)
    demo_seeds: int = 5
    demo_epochs: int = 12
    timed_steps: int = 40
    train_size: int = 6000
    test_size: int = 2000

    def job(self, setting: Setting, seed: int, repeats: int, validation: bool = False) -> Job:
        return Job(setting, seed, self.width, repeats, self.epochs, self.train_size, self.test_size, validation)

    def jobs(self, setting: Setting, repeats: int, validation: bool = False) -> list[Job]:
        """One job for each seed."""
        return [self.job(setting, seed, repeats, validation) for seed in range(self.seeds)]


QUICK = Scale(
    search=4, seeds=2, epochs=3, repeats=(1, 2), noise=(0.01, 1.0), samples=(2, 8), demo_seeds=2, demo_epochs=3,
    timed_steps=10, train_size=3000, test_size=1000,
)  # fmt: skip


def study(scale: Scale, out: Path, workers: int) -> None:
    """Write every table as CSV and Markdown and every figure as PNG to ``out``, as soon as its runs are done."""
    out.mkdir(parents=True, exist_ok=True)
    with Runs(out / "runs.jsonl", workers) as runs:
        settings = search(scale, runs, out)
        demo(scale, runs, settings, out)
        depth(scale, runs, settings, out)
        noise(scale, runs, settings, out)
        samples(scale, runs, settings, out)
        transfer(scale, runs, settings, out)
    cost(scale, settings, out)


def search(scale: Scale, runs: Runs, out: Path) -> Settings:
    """Part (a), on the shallow network and the validation digits."""
    shallow = scale.repeats[0]

    def mean(setting: Setting) -> float:
        return statistics.fmean(runs[job].accuracy for job in scale.jobs(setting, shallow, validation=True))

    decays = [replace(WITH_UNITS["bp"], weight_decay=decay) for decay in WEIGHT_DECAYS]
    runs.do("weight decay", [job for bp in decays for job in scale.jobs(bp, shallow, validation=True)])
    bp = max(decays, key=mean)
    fa = replace(WITH_UNITS["fa"], weight_decay=bp.weight_decay)
    counts = {name: scale.search // 2 if name in ESTIMATION else scale.search for name in BOXES}
    tried = {
        name: [scale.job(s, 0, shallow, validation=True) for s in candidates(name, count, bp.weight_decay)]
        for name, count in counts.items()
    }
    runs.do("search", [*scale.jobs(fa, shallow, validation=True), *itertools.chain(*tried.values())])

    for jobs in tried.values():
        jobs.sort(key=lambda job: -runs[job].accuracy)
    reached = {name: [runs[job].accuracy for job in jobs] for name, jobs in tried.items()}
    diverged = {name: [runs[job].diverged for job in jobs] for name, jobs in tried.items()}
    write(out / "search", [_distribution(name, reached[name], diverged[name], mean(fa), mean(bp)) for name in tried])
    study_figures.search(reached, mean(fa), mean(bp), layers(shallow), out / "search.png")
    settings = {"bp": [bp], "fa": [fa]} | {name: [job.setting for job in jobs] for name, jobs in tried.items()}
    write(out / "settings", [_described(name, best[0]) for name, best in settings.items()])
    return settings


def candidates(name: str, count: int, weight_decay: float) -> list[Setting]:
    """The setting of tuned.py with coefficients drawn from the ranges of the rule by a Sobol sequence."""
    preset, box = WITH_UNITS[name], BOXES[name]
    found = []
    for point in torch.quasirandom.SobolEngine(len(box), scramble=True, seed=0).draw(count).tolist():
        drawn = {c: low * (high / low) ** u for (c, (low, high)), u in zip(box.items(), point, strict=True)}
        if name == "oja":
            drawn["null"] = drawn["amp"]
        # Kolen-Pollack aligns B if W has the same decay.
        decay = drawn["decay"] if name == "kp" else weight_decay
        found.append(replace(preset, rule=replace(preset.rule, **drawn), weight_decay=decay))
    return found


def _distribution(name: str, values: Sequence[float], diverged: Sequence[bool], fa: float, bp: float) -> dict:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "rule": name,
        "settings": len(values),
        "above fa (%)": round(100 * sum(v > fa for v in values) / len(values)),
        "within 5 points of bp (%)": round(100 * sum(v > bp - 5 for v in values) / len(values)),
        "diverged (%)": round(100 * sum(diverged) / len(values)),
        "accuracy (%): best": round(max(values), 1),
        "upper quartile": round(high, 1),
        "median": round(median, 1),
        "lower quartile": round(low, 1),
    }


def _described(name: str, setting: Setting) -> dict:
    coefficients = {
        c.strip("_"): f"{v:.3g}" if (v := getattr(setting.rule, c)) else ""
        for c in ("amp", "null", "sparse", "self_", "decay")
    }
    step = {"lr of B": setting.lr or "", "momentum of B": setting.momentum or ""}
    return {"rule": name, **coefficients, **step, "weight decay of W": f"{setting.weight_decay:.3g}"}


def demo(scale: Scale, runs: Runs, settings: Settings, out: Path) -> None:
    """Weight estimation against backprop, with the network of two_routes.py."""
    jobs = {
        name: [
            Job(settings[name][0], seed, 16, 1, scale.demo_epochs, scale.train_size, scale.test_size)
            for seed in range(scale.demo_seeds)
        ]
        for name in ("bp", *ESTIMATION)
    }
    runs.do("demo", itertools.chain(*jobs.values()))
    write(out / "demo", [{"rule": name, **measured(runs, jobs[name], jobs["bp"])} for name in jobs])


def depth(scale: Scale, runs: Runs, settings: Settings, out: Path) -> None:
    """Part (b): the best setting of the shallow network at every depth."""
    jobs = {(name, r): scale.jobs(settings[name][0], r) for name in RULES for r in scale.repeats}
    runs.do("depth", itertools.chain(*jobs.values()))
    rows = [
        {"rule": name, "layers": layers(r), **measured(runs, group, jobs["bp", r])} for (name, r), group in jobs.items()
    ]
    study_figures.depth(write(out / "depth", rows), out / "depth.png")


def transfer(scale: Scale, runs: Runs, settings: Settings, out: Path) -> None:
    """Part (a), continued: the best settings of the shallow network, unchanged, in deeper networks."""
    jobs = {(name, r): [scale.job(s, 0, r) for s in settings[name][:KEPT]] for name in LOCAL for r in scale.repeats}
    runs.do("transfer", itertools.chain(*jobs.values()))
    rows = []
    for (name, r), group in jobs.items():
        bp = statistics.fmean(runs[job].accuracy for job in scale.jobs(settings["bp"][0], r))
        behind = [bp - runs[job].accuracy for job in group]
        ranked = {f"behind bp (points), rank {i}": round(gap, 1) for i, gap in enumerate(behind, 1)}
        rows.append({"rule": name, "layers": layers(r), **ranked, **spread("over the ranks", behind)})
    study_figures.transfer(write(out / "transfer", rows), out / "transfer.png")


def noise(scale: Scale, runs: Runs, settings: Settings, out: Path) -> None:
    """Part (c), on the shallow network: weight estimation, and the two rules without a feedback update."""
    r = scale.repeats[0]
    jobs = {(name, 0.0): scale.jobs(settings[name][0], r) for name in ("bp", "fa", *ESTIMATION)}
    for name, level in itertools.product(ESTIMATION, scale.noise):
        jobs[name, level] = scale.jobs(replace(settings[name][0], noise=level), r)
    runs.do("noise", itertools.chain(*jobs.values()))
    rows = [
        {"rule": name, "noise": level, **measured(runs, group, jobs["bp", 0.0])}
        for (name, level), group in sorted(jobs.items(), key=lambda item: RULES.index(item[0][0]))
    ]
    study_figures.noise(write(out / "noise", rows), layers(r), out / "noise.png")


def samples(scale: Scale, runs: Runs, settings: Settings, out: Path) -> None:
    """Part (d), on the shallow network: rules that read the activations of ``samples`` images of each batch."""
    r = scale.repeats[0]
    jobs = {}
    for name, count in itertools.product(SAMPLED, (*scale.samples, BATCH)):
        setting = settings[name][0]
        jobs[name, count] = scale.jobs(replace(setting, rule=_sampled(setting.rule, count)), r)
    reference = {name: scale.jobs(settings[name][0], r) for name in ("bp", "fa")}
    runs.do("samples", itertools.chain(*jobs.values(), *reference.values()))
    rows = [
        {"rule": name, "samples": count, **measured(runs, group, reference["bp"])}
        for (name, count), group in jobs.items()
    ]
    rows += [
        {"rule": name, "samples": "", **measured(runs, group, reference["bp"])} for name, group in reference.items()
    ]
    study_figures.samples(write(out / "samples", rows), layers(r), out / "samples.png")


def _sampled(rule: pyfeedback.Rule, count: int) -> pyfeedback.Rule:
    return replace(rule, samples=0 if count == BATCH else count)


def cost(scale: Scale, settings: Settings, out: Path) -> None:
    """Part (d): a training step of the demo's network with its feedback update, on one thread; rules alternate."""
    torch.set_num_threads(1)
    data, _ = cluttered_digits.load("cluttered", 0, BATCH, 1)
    steps = {name: _step(settings[name][0], data) for name in RULES}
    for name in RULES:
        if (best := settings[name][0]).rule.reads_data:
            part = replace(best, rule=_sampled(best.rule, BATCH // 8))
            steps[f"{name}, 1/8 of the batch"] = _step(part, data)
    for step in steps.values():  # warm up
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(scale.timed_steps):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    bp = statistics.median(seconds["bp"])
    rows = []
    for name, times in seconds.items():
        low, median, high = (1e3 * t for t in statistics.quantiles(times, n=4))
        rows.append({
            "rule": name,
            "steps": len(times),
            "step (ms): median": round(median, 1),
            "quartiles": f"{low:.1f} to {high:.1f}",
            "relative to bp": round(median / (1e3 * bp), 2),
        })  # fmt: skip
    study_figures.cost(write(out / "cost", rows), out / "cost.png")


def _step(setting: Setting, data):
    """Return a function that trains a new demo network for one step."""
    torch.manual_seed(0)
    model = build(data.images.shape[-1], width=16, repeats=1)
    pyfeedback.convert(model[1], setting.rule)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(pyfeedback.forward_parameters(model), LR, MOMENTUM, weight_decay=setting.weight_decay)
    ]
    if setting.rule.learns:
        optimizers.append(pyfeedback.optim.FeedbackSGD(model, setting.lr, setting.momentum))

    def step() -> None:
        loss = F.cross_entropy(model(data.images), data.labels)
        for each in optimizers:
            each.zero_grad()
        loss.backward()
        for each in optimizers:
            each.step()

    return step


def layers(repeats: int) -> int:
    """The number of layers with weights in tuned.network."""
    return 4 + 3 * repeats


def measured(runs: Runs, jobs: Sequence[Job], bp: Sequence[Job]) -> dict:
    """The columns of one group of seeds. The gap to backprop is taken seed by seed."""
    accuracy = [runs[job].accuracy for job in jobs]
    return {
        "seeds": len(jobs),
        **spread("accuracy (%)", accuracy),
        **spread("behind bp (points)", [runs[b].accuracy - a for a, b in zip(accuracy, bp, strict=True)]),
        **spread("angle (degrees)", [angle for job in jobs if (angle := runs[job].angle) is not None]),
        "diverged": sum(runs[job].diverged for job in jobs),
    }


def spread(name: str, values: Sequence[float]) -> dict:
    """Mean and standard deviation as two columns; empty if there are no values."""
    if not values:
        return {name: "", f"{name} std": ""}
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {name: round(statistics.fmean(values), 2), f"{name} std": round(deviation, 2)}


def write(path: Path, rows: list[dict]) -> list[dict]:
    """Write the rows as ``path``.csv and ``path``.md, and return them."""
    table = path.with_suffix(".csv")
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".md").write_text(markdown(table))
    return rows


def markdown(table: Path) -> str:
    """Convert a CSV table to Markdown. A column "x std" is merged into the column "x" as "± std"."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if not name.endswith(" std")]

    def cell(row: dict[str, str], name: str) -> str:
        return f"{row[name]} ± {row[f'{name} std']}" if row.get(f"{name} std") else row[name]

    lines = [names, ["---"] * len(names), *([cell(row, name) for name in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    def count(text: str) -> int:
        if not text.isdigit() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
        return int(text)

    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few settings, seeds, images and epochs")
    parser.add_argument(
        "--workers", type=count, default=2, help="number of single-threaded processes; default %(default)s"
    )
    parser.add_argument("--out", type=Path, default=Path("study"), help="output folder; default ./%(default)s")
    options = parser.parse_args()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    start = time.perf_counter()
    try:
        study(QUICK if options.quick else Scale(), options.out, options.workers)
    except KeyboardInterrupt:
        raise SystemExit(
            f"interrupted: {options.out / 'runs.jsonl'} keeps what is done, start again to go on"
        ) from None
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes; figures and tables are in {options.out}")


if __name__ == "__main__":
    main()
