"""The training runs of transformer_study.py. Each run is a job with all its settings, and is saved when it ends."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cluttered_digits
import depth_study_runs
import image_data
import torch
import transformer_models
from cluttered_digits import Images
from depth_study_runs import rate
from torch import Tensor, nn
from torch.nn import functional as F

import pyfeedback

BETAS = (0.9, 0.99)
TEST_IMAGES = 2000
TEST_SHARE = 0.1  # of the text, at its end
KEEP_BP = {"patches": "bp"}  # no layer below: the patches need no error


@dataclass(frozen=True)
class Job:
    """One model to train. ``validation`` reports on a part of the training data instead of the test data."""

    model: str  # "gpt" or "vit"
    rule: str
    seed: int
    tau: float = 0.0  # 0: that of the preset, if any
    data: str = "text"  # or "fashion-mnist" or "digits"
    validation: bool = False
    steps: int = 1000
    batch: int = 16  # contexts or images
    lr: float = 2e-3
    weight_decay: float = 0.1
    warm_up: int = 100  # steps
    width: int = 64
    depth: int = 3  # blocks
    measurements: int = 10  # of the test data in a run
    start: float = 1.0  # factor of the initial weights of the projections, and thereby of the feedback weights

    @property
    def label(self) -> str:
        """The rule, and the time constant that was chosen for it."""
        return f"{self.rule}, tau {self.tau:g}" if self.tau else self.rule

    @property
    def key(self) -> str:
        """The job as text: all settings that determine the result."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Outcome:
    """The result of a job.

    Attributes:
        loss: in nats per character or image of the test data, before training and after equal numbers of steps.
        accuracy: in per cent, at the same times.
        baseline: the least loss of a model without input, the entropy of the frequencies of the test targets.
        angles: between feedback and weight of each layer after the last step, in degrees; empty under bp.
        norm_ratios: |B| / |W| of each layer; empty under bp.
        seconds: processor time.
    """

    loss: Sequence[float]
    accuracy: Sequence[float]
    baseline: float
    angles: dict[str, float]
    norm_ratios: dict[str, float]
    seconds: float


class Runs(depth_study_runs.Runs):
    """The finished jobs of this study."""

    outcome = Outcome

    def submit(self, job: Job) -> Future:
        assert self.pool is not None
        return self.pool.submit(train, job, self.root)


class Task(NamedTuple):
    """A model, its batches in the order of a seed, and the inputs and targets to measure it with."""

    model: nn.Module
    batches: Iterator[tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]

    def loss(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.model(input).flatten(0, -2), target.flatten())


def split(characters: Tensor, validation: bool) -> tuple[Tensor, Tensor]:
    """The training text and the test text behind it, or, with ``validation``, the same split of the training text."""
    for _ in range(2 if validation else 1):
        at = int((1 - TEST_SHARE) * len(characters))
        characters, test = characters[:at], characters[at:]
    return characters, test


def gpt(job: Job, _: Path) -> Task:
    """Batches are contexts that start at random characters. The test text is cut into contexts."""
    characters, vocabulary = transformer_models.text()
    training, test = split(characters, job.validation)
    length = transformer_models.CONTEXT + 1  # the targets are the characters after those of the context
    windows, contexts = training.unfold(0, length, 1), test.unfold(0, length, length - 1)
    order = torch.Generator().manual_seed(job.seed)  # the same under every rule, although the rules draw B and probes

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            chosen = windows[torch.randint(len(windows), (job.batch,), generator=order)]
            yield chosen[:, :-1], chosen[:, 1:]

    model = transformer_models.GPT(len(vocabulary), width=job.width, depth=job.depth)
    return Task(model, batches(), (contexts[:, :-1], contexts[:, 1:]))


def vit(job: Job, root: Path) -> Task:
    """Batches are parts of a random order of the images. Of Fashion-MNIST, a run sees each image once."""
    training, test = images(job.data, job.steps * job.batch, job.validation, root)
    order = torch.Generator().manual_seed(job.seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for chosen in torch.randperm(len(training.images), generator=order).split(job.batch):
                yield training.images[chosen], training.labels[chosen]

    model = transformer_models.ViT(classes=10, width=job.width, depth=job.depth)
    return Task(model, batches(), (test.images, test.labels))


@cache
def images(name: str, size: int, validation: bool, root: Path) -> tuple[Images, Images]:
    """``size`` training images of Fashion-MNIST, or all digits of scikit-learn, and test images, with 28x28 pixels."""
    if name == "digits":
        training, test = cluttered_digits.load(name, validation=validation)
        training, test = (side._replace(images=F.interpolate(side.images, 28)) for side in (training, test))
    else:
        training, test = image_data.load(name, size, TEST_IMAGES, validation, root=root)
        training, test = (side._replace(images=side.images[..., 2:-2, 2:-2]) for side in (training, test))
    return training, test


TASKS: dict[str, Callable[[Job, Path], Task]] = {"gpt": gpt, "vit": vit}


def convert(model: nn.Module, job: Job) -> None:
    """Give the model the rule of the job. Embeddings have no feedback weight."""
    rule = pyfeedback.rule(job.rule, **({"tau": job.tau} if job.tau else {}))
    pyfeedback.convert(model, {**KEEP_BP, "*": rule})


@torch.no_grad()
def start_small(model: nn.Module, factor: float) -> None:
    """Multiply the weights of the projections by ``factor``."""
    for module in (*model.blocks.modules(), model.head):
        if isinstance(module, nn.MultiheadAttention):
            module.in_proj_weight.mul_(factor)
        elif isinstance(module, nn.Linear):
            module.weight.mul_(factor)


def train(job: Job, root: Path) -> Outcome:
    """Train a new model by one rule. This function shows all that is needed to use the package."""
    torch.manual_seed(job.seed)
    task, began = TASKS[job.model](job, root), time.process_time()
    start_small(task.model, job.start)
    options = {"lr": job.lr, "betas": BETAS, "weight_decay": job.weight_decay}
    optimizer: torch.optim.Optimizer
    if job.rule == "bp":
        optimizer = torch.optim.AdamW(task.model.parameters(), **options)
    else:
        convert(task.model, job)
        optimizer = pyfeedback.optim.AdamW(task.model, **options)
        optimizer.probe_seed = job.seed
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, job.steps, job.warm_up))

    measured = [measure(task)]
    for step in range(1, job.steps + 1):
        loss = task.loss(*next(task.batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (job.steps // job.measurements) == 0:
            measured.append(measure(task))
            if not math.isfinite(measured[-1][0]):
                break
    losses, accuracies = zip(*measured, strict=True)
    found = pyfeedback.alignment(task.model) if job.rule != "bp" else {}
    angles = {name: round(layer.angle, 2) for name, layer in found.items()}
    ratios = {name: round(layer.norm_ratio, 3) for name, layer in found.items()}
    baseline = round(transformer_models.entropy(task.test[1].flatten()), 4)
    return Outcome(losses, accuracies, baseline, angles, ratios, round(time.process_time() - began, 2))


@torch.no_grad()
def measure(task: Task) -> tuple[float, float]:
    """The loss and the accuracy in per cent, on the test data."""
    task.model.eval()
    parts = zip(*(side.split(100) for side in task.test), strict=True)
    loss, right = 0.0, 0.0
    for input, target in parts:
        logits = task.model(input)
        loss += F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="sum").item()
        right += (logits.argmax(-1) == target).sum().item()
    task.model.train()
    n = task.test[1].numel()
    return round(loss / n, 4), round(100 * right / n, 2)
