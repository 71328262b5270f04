"""The training runs of depth_study.py. Each run is a job with all its settings, and is saved when it ends."""

import json
import math
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import image_data
import image_networks
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import pyfeedback


@dataclass(frozen=True)
class Setting:
    """A rule with the numbers that are chosen for it. ``name`` is a rule, or a rule and what it reads: "ia-probes".

    ``tau``, ``nu`` and ``growth`` are 0 where the rule has no such number. ``weight_decay`` is that of all forward
    parameters, but under kp, ``tau`` determines that of the weights with a feedback weight.
    """

    name: str
    weight_decay: float
    tau: float = 0.0
    nu: float = 0.0
    growth: float = 0.0

    @property
    def rule(self) -> pyfeedback.Rule:
        name = self.name.removesuffix("-data")
        options = {key: value for key in ("tau", "nu", "growth") if (value := getattr(self, key))}
        if name == "aa":
            return pyfeedback.rule(name, **options, center=True)
        return pyfeedback.rule(name, **options)


@dataclass(frozen=True)
class Job:
    """One network to train. ``validation`` reports on held-out training images instead of the test images."""

    setting: Setting
    network: str
    data: str
    seed: int
    validation: bool = False
    epochs: int = 8
    train_size: int = 6000
    test_size: int = 2000
    width: int = 8
    batch: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    warm_up: int = 50  # steps
    start: float = 0.1  # factor of the initial weights that a batch norm follows

    @property
    def key(self) -> str:
        """The job as text: all settings that determine the result."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Outcome:
    """The result of a job.

    Attributes:
        accuracy: in per cent, after each epoch.
        angle: between feedback and weight after the last epoch, in degrees, the mean over the layers; None under bp.
        norm_ratio: |B| / |W| after the last epoch, the mean over the layers; None under bp.
        diverged: whether the loss was infinite or nan. Training ends after such an epoch.
        seconds: processor time.
    """

    accuracy: Sequence[float]
    angle: float | None
    norm_ratio: float | None
    diverged: bool
    seconds: float


def read(path: Path, outcome: type = Outcome) -> dict:
    """The ``outcome`` of each finished job of a file, by key. An incomplete last line, of a killed job, is skipped."""
    text = path.read_text() if path.exists() else ""
    runs = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {json.dumps(run["job"], sort_keys=True): outcome(**run["outcome"]) for run in runs}


class Runs:
    """The finished jobs, in memory and as lines of the file ``path``. Equal jobs are trained once.

    A study with other jobs, dataclasses with a ``key``, overrides ``outcome`` and ``submit``.

    Args:
        path: the file; if it is missing, no job is done.
        workers: the number of single-threaded processes. With 0, no job is trained.
        root: the folder of the images.
        minutes: no job is started after this time.
    """

    outcome: type = Outcome

    def __init__(self, path: Path, workers: int = 0, root: Path = Path("data"), minutes: float = math.inf):
        self.path, self.workers, self.root = path, workers, root
        self.outcomes = read(path, self.outcome)
        self.end = time.monotonic() + 60 * minutes
        self.pool: ProcessPoolExecutor | None = None
        if workers:
            _remove_incomplete_line(path)
            self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare)

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def __getitem__(self, job: Job) -> Outcome | None:
        """The outcome of a job; None if it is not done."""
        return self.outcomes.get(job.key)

    def of(self, jobs: Iterable[Job]) -> list[Outcome]:
        """The outcomes of the jobs that are done."""
        return [outcome for job in jobs if (outcome := self[job]) is not None]

    def submit(self, job: Job) -> Future:
        """Start to train a job in a process of the pool."""
        assert self.pool is not None
        return self.pool.submit(train, job, self.root)

    def do(self, title: str, jobs: Iterable[Job]) -> None:
        """Train the jobs that are not done yet, in their order, until the time is over."""
        if self.pool is None:
            return
        jobs = list(dict.fromkeys(jobs))
        todo = [job for job in jobs if self[job] is None]
        waiting, running = iter(todo), {}
        with (
            tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=title, unit="run", disable=None) as bar,
            self.path.open("a") as file,
        ):
            while True:
                while len(running) < self.workers and time.monotonic() < self.end:
                    job = next(waiting, None)
                    if job is None:
                        break
                    running[self.submit(job)] = job
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, outcome = running.pop(future), future.result()
                    self.outcomes[job.key] = outcome
                    file.write(json.dumps({"job": asdict(job), "outcome": asdict(outcome)}) + "\n")
                    file.flush()
                    bar.update()
        done = sum(self[job] is not None for job in todo)
        print(f"{title}: {done} runs, {len(jobs) - len(todo)} found, {len(todo) - done} left", flush=True)


def _remove_incomplete_line(path: Path) -> None:
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])


def _prepare() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study handles Ctrl-C and lets running jobs end


@cache
def _images(data: str, train_size: int, test_size: int, validation: bool, root: Path):
    return image_data.load(data, train_size, test_size, validation, root=root)


def train(job: Job, root: Path, change_feedback: Callable[[nn.Module], None] = lambda model: None) -> Outcome:
    """Train a new network by one rule. This function shows all that is needed to use the package.

    ``change_feedback`` is called with the model before the first step and after each step.
    """
    training, test = _images(job.data, job.train_size, job.test_size, job.validation, root)
    began = time.process_time()
    torch.manual_seed(job.seed)
    # A seventh faster. With a width of 4, the projections corrupt the heap: torch 2.13 (CPU), in the backward of
    # Conv2d(4, 8, 1, stride=2) in channels_last.
    model = image_networks.build(job.network, job.width, stride=2).to(memory_format=torch.channels_last)
    pyfeedback.start_small(model, job.start)
    setting, rule = job.setting, job.setting.rule
    # The stem has no layer below it to send an error to, so the feedback path starts after it. B is drawn with the
    # standard deviation of W, and starts small as well.
    pyfeedback.convert(model[1], rule)
    optimizer: torch.optim.Optimizer
    if rule.transport:
        optimizer = torch.optim.SGD(model.parameters(), job.lr, job.momentum, weight_decay=setting.weight_decay)
    else:
        optimizer = pyfeedback.optim.SGD(model, job.lr, job.momentum, setting.weight_decay)
        optimizer.probe_seed = job.seed
    steps = len(training.images) // job.batch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, job.epochs * steps, job.warm_up))

    change_feedback(model)
    accuracy, diverged = [], False
    order = torch.Generator().manual_seed(job.seed)  # the same under every rule, although the rules draw B and probes
    for _ in range(job.epochs):
        model.train()
        total = 0.0
        for chosen in torch.randperm(len(training.images), generator=order)[: steps * job.batch].split(job.batch):
            loss = F.cross_entropy(model(training.images[chosen]), training.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            change_feedback(model)
            schedule.step()
            total += loss.item()
        accuracy.append(round(measure(model, test), 3))
        diverged = not math.isfinite(total)
        if diverged:
            break
    layers = pyfeedback.alignment(model).values()
    angle, ratio = mean([layer.angle for layer in layers]), mean([layer.norm_ratio for layer in layers])
    return Outcome(accuracy, angle, ratio, diverged, round(time.process_time() - began, 2))


def rate(step: int, steps: int, warm_up: int) -> float:
    """The learning rate at a step, relative to the full one: a linear warm-up and a cosine."""
    return min(1.0, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def measure(model: nn.Module, images) -> float:
    """The accuracy in per cent."""
    model.eval()
    guesses = torch.cat([model(part).argmax(1) for part in images.images.split(500)])
    return 100 * (guesses == images.labels).float().mean().item()


def mean(values: Sequence[float]) -> float | None:
    """The mean, rounded; None without values, or if one of them is not finite."""
    return round(statistics.fmean(values), 4) if values and all(map(math.isfinite, values)) else None
