"""Two routes to credit assignment without weight transport: seven rules train the same convolutional network.

    python examples/two_routes.py                                  # cluttered digits, three seeds, four minutes
    python examples/two_routes.py --rule bp fa oja usf frsf brsf pfa dfa
    python examples/two_routes.py --sweep                          # wm and ia over one grid of coefficients

Writes two_routes.png (accuracy and alignment by epoch) and two_routes.json (settings, curves, versions) to --out. If
interrupted, it keeps the finished runs. The two routes are those of Kunin et al., ICML 2020. Local rules (wm, ia) read
only an input and the response of a layer to it. Weight estimation (sa, aa, kp) moves the feedback towards the forward
weight by comparing the two weights, their responses or their updates. For wm, ia and aa, the input is white noise here.
The settings are in tuned.py. They have no units, and were chosen on validation digits.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import platform
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import cluttered_digits
import demo_figure
import sklearn
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm
from tuned import LR, MOMENTUM, PAPER, SETTINGS, WITH_UNITS, Setting, network

import pyfeedback

BATCH = 64
AGES, ROUNDS = 8, 6  # steps of a run at which the time of a step is measured, and how often at each of them
EPOCHS = {"cluttered": 7, "digits": 30}
TITLES = {
    "bp": "backprop",
    "fa": "feedback alignment",
    "wm": "weight mirror",
    "ia": "information alignment",
    "sa": "symmetric alignment",
    "aa": "activation alignment",
    "kp": "Kolen-Pollack",
    "oja": "Oja's rule",
    "usf": "sign-symmetry, uniform",
    "frsf": "sign-symmetry, fixed",
    "brsf": "sign-symmetry, batch",
    "pfa": "product feedback alignment",
    "dfa": "direct feedback alignment",
}


@dataclass
class Result:
    """One run of a rule. Curves start before the first epoch; ``angles`` has one number per layer for each epoch."""

    setting: Setting
    accuracy: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    angles: list[list[float]] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        return not all(map(math.isfinite, self.loss))

    @property
    def mean_angles(self) -> list[float]:
        return [statistics.fmean(layers) for layers in self.angles if layers]


class Trainer:
    """A new network, its rule and its optimizers. This class shows all that is needed to use the package.

    Args:
        steps: of the whole run.
    """

    def __init__(self, setting: Setting, training, steps: int, seed: int, build: Callable[[int], nn.Module] = network):
        torch.manual_seed(seed)
        self.model = model = build(training.images.shape[-1])
        # The stem has no layer below it to send an error to, so the feedback path starts after it.
        pyfeedback.convert(model[1], setting.rule, init=setting.init)
        model.to(training.images.device)

        decay = setting.weight_decay
        optimizer: torch.optim.Optimizer
        if setting.rule.tau:
            optimizer = pyfeedback.optim.SGD(model, LR, MOMENTUM, weight_decay=decay, noise=setting.noise)
        else:
            optimizer = torch.optim.SGD(pyfeedback.forward_parameters(model), LR, MOMENTUM, weight_decay=decay)
        self.optimizers, self.schedules = [optimizer], [CosineAnnealingLR(optimizer, steps)]
        if setting.rule.learns and not setting.rule.tau:
            feedback = pyfeedback.optim.FeedbackSGD(model, setting.lr, setting.momentum, noise=setting.noise)
            self.optimizers.append(feedback)
            if setting.cosine:
                self.schedules.append(CosineAnnealingLR(feedback, steps))

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Train on a batch, and return its loss."""
        loss = F.cross_entropy(self.model(images), labels)
        for each in self.optimizers:
            each.zero_grad()
        loss.backward()
        for each in self.optimizers + self.schedules:
            each.step()
        return loss.item()


def train(
    setting: Setting,
    data,
    epochs: int,
    seed: int,
    after_step: Callable = lambda: None,
    after_epoch: Callable = lambda _: None,
    build: Callable[[int], nn.Module] = network,
) -> Result:
    """Train a new network by one rule."""
    training, test = data
    steps = len(training.images) // BATCH
    trainer = Trainer(setting, training, epochs * steps, seed, build)
    model = trainer.model
    result = Result(setting)
    observe(result, model, test)
    for _ in range(epochs):
        model.train()
        total = 0.0
        order = torch.randperm(len(training.images)).to(training.images.device)
        for chosen in order[: steps * BATCH].split(BATCH):
            total += trainer.step(training.images[chosen], training.labels[chosen])
            after_step()
        result.loss.append(total / steps)
        observe(result, model, test)
        after_epoch(result)
        if result.diverged:
            break
    return result


@torch.no_grad()
def observe(result: Result, model: nn.Module, test) -> None:
    """Append the test accuracy in per cent, and the angle between feedback and weight of each layer in degrees."""
    model.eval()
    guesses = torch.cat([model(images).argmax(1) for images in test.images.split(500)])
    result.accuracy.append(100 * (guesses == test.labels).float().mean().item())
    result.angles.append([layer.angle for layer in pyfeedback.alignment(model).values() if layer.norm_ratio > 0])


def run(names: list[str], options: argparse.Namespace) -> dict[str, list[Result]]:
    """Train by each rule with each seed, in single-threaded processes. Ctrl-C returns the finished runs."""
    jobs = [(name, options.seed + i) for i in range(options.seeds) for name in names]
    finished: dict[tuple[str, int], Result] = {}
    task = partial(_train, data=options.data, device=options.device, epochs=options.epochs)
    with (
        tqdm(total=len(jobs), unit="run", dynamic_ncols=True) as bar,
        multiprocessing.get_context("spawn").Pool(options.workers, _prepare) as pool,
    ):
        try:
            for job, result in pool.imap_unordered(task, jobs):
                finished[job] = result
                bar.update()
                bar.set_postfix_str(f"{job[0]}, seed {job[1]}: {result.accuracy[-1]:.1f} %")
        except KeyboardInterrupt:
            bar.set_description("interrupted")
    by_name = {name: [finished[job] for job in jobs if job[0] == name and job in finished] for name in names}
    return {name: results for name, results in by_name.items() if results}


def _prepare() -> None:
    """Prepare a process of the pool. Ctrl-C is handled by its parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@cache
def _load(data: str, device: str):
    """The training set and the test set on the device."""
    return [
        side._replace(images=side.images.to(device), labels=side.labels.to(device))
        for side in cluttered_digits.load(data)
    ]


def _train(job: tuple[str, int], data: str, device: str, epochs: int) -> tuple[tuple[str, int], Result]:
    name, seed = job
    return job, train(SETTINGS[name], _load(data, device), epochs, seed, build=_channels_last)


def _channels_last(size: int) -> nn.Module:
    """The network in the memory format that is faster."""
    return network(size).to(memory_format=torch.channels_last)


def step_times(names: list[str], options: argparse.Namespace) -> dict[str, float]:
    """The time of a training step by each rule relative to bp, on one thread: processor time on a CPU.

    The rules alternate step by step, so that other load on the machine affects all of them alike. The time of probes
    changes over a run. A figure is therefore a mean over steps at regular intervals of a run; that of each is the
    median over the rounds of the ratio within a round.
    """
    torch.set_num_threads(1)
    training, _ = _load(options.data, options.device)
    steps = options.epochs * (len(training.images) // BATCH)
    trainers = {
        name: Trainer(SETTINGS[name], training, steps, options.seed, _channels_last)
        for name in dict.fromkeys(["bp", *names])
    }
    batch = training.images[:BATCH], training.labels[:BATCH]
    for trainer in trainers.values():  # warm up
        trainer.step(*batch)
    medians: dict[str, list[float]] = {name: [] for name in trainers}
    for age in tqdm(range(0, steps, math.ceil(steps / AGES)), "time of a step", dynamic_ncols=True):
        rounds = [_round(trainers, batch, age, backwards=bool(i % 2)) for i in range(ROUNDS)]
        for name, found in medians.items():
            found.append(statistics.median(seconds[name] / seconds["bp"] for seconds in rounds))
    return {name: statistics.fmean(found) for name, found in medians.items()}


def _round(trainers: dict[str, Trainer], batch: tuple[Tensor, Tensor], age: int, backwards: bool) -> dict[str, float]:
    """Time a step by each rule, as if it came after ``age`` others."""
    seconds = {}
    for name in sorted(trainers, reverse=backwards):
        for group in trainers[name].optimizers[0].param_groups:
            if "feedback_step" in group:
                group["feedback_step"] = age - 1  # the number of the step before
        start = _clock(batch[0].device)
        trainers[name].step(*batch)
        seconds[name] = _clock(batch[0].device) - start
    return seconds


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def table(results: dict[str, list[Result]], times: dict[str, float]) -> str:
    """The last epoch of each rule: means over the seeds, and the standard deviation of the accuracy.

    The distance to bp is that of equal seeds. Time is that of a step, relative to bp. Angles are in degrees.
    """
    lines = ["rule  seeds  test %  std  behind bp  time  angle  of each layer, first to last"]
    for name, runs in results.items():
        reached, bp = [result.accuracy[-1] for result in runs], results.get("bp", [])
        std = f"{statistics.stdev(reached):.1f}" if len(runs) > 1 else "-"
        behind = "-"
        if bp:
            behind = f"{statistics.fmean(b.accuracy[-1] - r.accuracy[-1] for b, r in zip(bp, runs, strict=False)):.1f}"
        layers = [statistics.fmean(layer) for layer in zip(*(result.angles[-1] for result in runs), strict=True)]
        angle = f"{statistics.fmean(layers):.0f}" if layers else "-"
        each = " ".join(f"{a:3.0f}" for a in layers) or "  - (no feedback weight)"
        failed = sum(result.diverged for result in runs)
        note = f"  {failed} diverged" if failed else ""
        mean = f"{statistics.fmean(reached):.1f}"
        lines.append(
            f"{name:4}  {len(runs):5}  {mean:>6}  {std:>3}  {behind:>9}  {times[name]:4.2f}  {angle:>5}  {each}{note}"
        )
    return "\n".join(lines)


def sweep(data, epochs: int, seed: int) -> dict:
    """Train wm and ia with units (null = amp) on a grid of two decades of amp by one of decay; fa is the baseline."""

    def end(setting):
        return train(setting, data, epochs, seed).accuracy[-1]

    found: dict = {"fa": end(SETTINGS["fa"]), "wm": [], "ia": []}
    grid = list(itertools.product((0.01, 0.03, 0.1, 0.3, 1.0), (0.01, 0.03, 0.1)))
    for name in ("wm", "ia"):
        for amp, decay in tqdm(grid, desc=f"{name} grid", unit="setting", dynamic_ncols=True):
            rule = replace(WITH_UNITS[name].rule, amp=amp, null=amp if name == "ia" else 0.0, decay=decay)
            accuracy = end(replace(WITH_UNITS[name], rule=rule))
            found[name].append({"amp": amp, "null": rule.null, "decay": decay, "accuracy": accuracy})
        reached = [each["accuracy"] for each in found[name]]
        above, failed = sum(a > found["fa"] for a in reached), sum(a < 20 for a in reached)
        print(
            f"{name}: {above} of {len(grid)} settings end above fa's {found['fa']:.1f} %, {failed} below 20 %; "
            f"median {statistics.median(reached):.1f} %, best {max(reached):.1f} %"
        )
    return found


def write_json(path: Path, options: argparse.Namespace, found: dict) -> None:
    """Write the options, the results and the versions of the software."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "scikit-learn": sklearn.__version__}
    report = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "forward": {"batch": BATCH, "lr": LR, "momentum": MOMENTUM},
        "versions": {"pyfeedback": pyfeedback.__version__, **versions},
        **found,
    }
    path.write_text(json.dumps(_finite(report), indent=1) + "\n")


def _finite(value):
    """Replace numbers that are not finite (of a rule that diverged) by null: JSON has no nan."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """The whole number above 0 of a command-line argument."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse() -> argparse.Namespace:
    def device(text):
        try:
            torch.empty(0, device=text)
        except (RuntimeError, AssertionError) as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {str(error).splitlines()[0]}") from None
        return text

    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rule", nargs="+", choices=SETTINGS, default=list(PAPER), metavar="RULE",
                        help=f"one or several of {', '.join(SETTINGS)} (default {' '.join(PAPER)})")  # fmt: skip
    parser.add_argument("--data", choices=cluttered_digits.NAMES, default="cluttered", help="default %(default)s")
    parser.add_argument("--epochs", type=positive, help="default 7 for cluttered, 30 for digits, half of it in a sweep")
    parser.add_argument("--seed", type=int, default=0, help="first seed of weights and order; default %(default)s")
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds; default %(default)s")
    parser.add_argument("--workers", type=positive, default=2, help="number of processes; default %(default)s")
    parser.add_argument("--device", type=device, default="cpu", help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("."), help="output folder; default: the current folder")
    parser.add_argument("--sweep", action="store_true", help="train wm and ia on a grid of coefficients")
    options = parser.parse_args()
    if options.epochs is None:
        options.epochs = math.ceil(EPOCHS[options.data] / (2 if options.sweep else 1))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return options


def main() -> None:
    options = parse()
    if options.sweep:
        try:
            found = sweep(_load(options.data, options.device), options.epochs, options.seed)
        except KeyboardInterrupt:
            raise SystemExit("interrupted: nothing written") from None
        write_json(options.out / "two_routes_sweep.json", options, found)
        return
    names = list(dict.fromkeys(options.rule))
    try:
        times = step_times(names, options)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing written") from None
    results = run(names, options)
    if not results:
        raise SystemExit("interrupted before the first run finished: nothing written")
    print(table(results, times))
    found = {name: [asdict(result) for result in runs] for name, runs in results.items()}
    write_json(options.out / "two_routes.json", options, {"times": times, "results": found})
    accuracy = {name: [result.accuracy for result in runs] for name, runs in results.items()}
    angles = {name: [result.mean_angles for result in runs] for name, runs in results.items()}
    demo_figure.draw(accuracy, angles, TITLES, options.out / "two_routes.png")
    print(f"wrote {options.out / 'two_routes.png'} and {options.out / 'two_routes.json'}")


if __name__ == "__main__":
    main()
