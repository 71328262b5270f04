"""The runs of study.py: many small trainings in single-threaded processes, each saved when it ends."""

import json
import math
import multiprocessing
import signal
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import cluttered_digits
import torch
from torch import nn
from tqdm import tqdm
from tuned import Setting, network
from two_routes import train


@dataclass(frozen=True)
class Job:
    """One network to train. ``validation`` reports on held-out training digits instead of the test digits."""

    setting: Setting
    seed: int
    width: int
    repeats: int
    epochs: int
    train_size: int
    test_size: int
    validation: bool = False

    @property
    def key(self) -> str:
        """The job as text, with the fields of its rule that differ from their defaults."""
        setting = vars(self.setting) | {"rule": str(self.setting.rule)}
        return json.dumps(vars(self) | {"setting": setting}, sort_keys=True)

    @property
    def work(self) -> float:
        """A number roughly proportional to the duration of the job."""
        return self.epochs * self.train_size * self.width * (1 + self.repeats) * (1 + self.setting.rule.reads_data)


@dataclass(frozen=True)
class Outcome:
    """Accuracy in per cent after the last epoch, and the mean angle over the layers in degrees, if any.

    ``seconds`` is processor time.
    """

    accuracy: float
    angle: float | None
    diverged: bool
    seconds: float


class Runs:
    """The finished jobs, in memory and as lines of the file ``path``. Equal jobs are trained once."""

    def __init__(self, path: Path, workers: int):
        self.path = path
        self.outcomes: dict[str, Outcome] = {}
        if path.exists():
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            path.write_text("".join(whole))  # the last line may be incomplete
            self.outcomes = {run["job"]: Outcome(**run["outcome"]) for run in map(json.loads, whole)}
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare)

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __getitem__(self, job: Job) -> Outcome:
        return self.outcomes[job.key]

    def do(self, title: str, jobs: Iterable[Job]) -> None:
        """Train the jobs that are not done yet, the longest first."""
        jobs = list(dict.fromkeys(jobs))
        todo = sorted((job for job in jobs if job.key not in self.outcomes), key=lambda job: -job.work)
        done = len(jobs) - len(todo)
        with (
            tqdm(total=len(jobs), initial=done, desc=title, unit="run", dynamic_ncols=True, disable=None) as bar,
            self.path.open("a") as file,
        ):
            futures = {self.pool.submit(_train, job): job for job in todo}
            for future in as_completed(futures):
                job, outcome = futures[future], future.result()
                self.outcomes[job.key] = outcome
                file.write(json.dumps({"job": job.key, "outcome": asdict(outcome)}) + "\n")
                file.flush()
                bar.update()
        if bar.disable:
            print(f"{title}: {len(todo)} runs, {done} found", flush=True)


def build(size: int, width: int, repeats: int) -> nn.Module:
    return network(size, width, repeats).to(memory_format=torch.channels_last)


def _prepare() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study handles Ctrl-C and lets running jobs end


@cache
def _images(train_size: int, test_size: int, validation: bool):
    return cluttered_digits.load("cluttered", 0, train_size, test_size, validation)


def _train(job: Job) -> Outcome:
    data = _images(job.train_size, job.test_size, job.validation)
    start = time.process_time()
    network = partial(build, width=job.width, repeats=job.repeats)
    result = train(job.setting, data, job.epochs, job.seed, build=network)
    angle = result.mean_angles[-1] if result.mean_angles and math.isfinite(result.mean_angles[-1]) else None
    return Outcome(result.accuracy[-1], angle, result.diverged, time.process_time() - start)
