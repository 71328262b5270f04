"""The training loop and the state that it needs to resume exactly after an interruption."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyfeedback
from training import models, recipe
from training.data import Images
from training.device import Place
from training.order import Loader
from training.settings import Settings


class MovingAverage:
    """Exponential moving average of two numbers, with bias correction."""

    def __init__(self, decay: float, device: torch.device):
        self.decay, self.total, self.weight = decay, torch.zeros(2, dtype=torch.float64, device=device), 0.0

    def update(self, values: Tensor) -> None:
        """Add a pair, without synchronizing with the device."""
        self.total.lerp_(values.to(self.total.dtype), 1 - self.decay)
        self.weight = self.decay * self.weight + 1 - self.decay

    def read(self, place: Place | None = None) -> list[float]:
        """The averages of this rank, or over all ranks of a place."""
        total = self.total if place is None else place.total(self.total.clone()) / place.ranks
        return (total / self.weight).tolist()


class Run:
    """A network in training, with its optimizers, its baseline, its monitor, and the rows of its log.

    Between two steps, :meth:`state_dict` has everything that determines the rest of the run.
    """

    def __init__(self, settings: Settings, images: Images, place: Place, workers: int = 0):
        torch.manual_seed(settings.seed)
        self.settings, self.place = settings, place
        self.loader = Loader(images, settings.batch, settings.seed, place, workers, settings.channels_last)
        network = models.build(settings.model, images.classes, images.shape).to(place.device)
        if settings.channels_last:
            network.to(memory_format=torch.channels_last)
        self.frozen = models.frozen_features(network) if settings.frozen else None
        self.network = models.convert(network, settings.rule, settings.feedback_scale)
        self.optimizers = recipe.optimizers(settings, self.network)
        self.frozen_optimizers = recipe.optimizers(settings, self.frozen) if self.frozen else []

        self.model = self._ready(self.network)
        self.frozen_model = self._ready(self.frozen) if self.frozen else None
        self.average = MovingAverage(settings.smoothing, place.device)
        self.norms = models.weight_norms(self.network)  # at the start, for the scale growth
        self.epoch = self.step = 0  # finished epochs, and steps of the current one
        self.seconds = 0.0
        self.rows: list[dict] = []
        self.monitor = self._watch(images) if place.first else None
        if place.device.type == "cuda":
            torch.cuda.manual_seed(settings.seed + place.rank)  # dropout differs between ranks

    def train(self, after_step: Callable[[], None], after_epoch: Callable[[], None]) -> None:
        """Train to the end. Both functions are called between steps, when the state is complete."""
        while self.epoch < self.settings.epochs and not self.diverged:
            self.model.train()
            if self.frozen_model:
                self.frozen_model.train()
            start = time.perf_counter() - self.seconds
            for images, labels in self.loader.epoch(self.epoch, self.step):
                self._train_step(images, labels)
                self.seconds = time.perf_counter() - start
                after_step()
            self.rows.append(self._row())
            self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
            after_epoch()

    @property
    def steps(self) -> int:
        """The number of steps since the start of the run."""
        return self.epoch * self.loader.steps + self.step

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return self.settings.lr * recipe.rate(self.settings, (self.steps - 1) / self.loader.steps)

    @property
    def diverged(self) -> bool:
        """True once the loss is not finite."""
        return any(not math.isfinite(row["train_loss"]) for row in self.rows[-1:])

    def evaluate(self, network: nn.Module) -> tuple[float, float]:
        """Mean loss and accuracy in per cent on the test images."""
        network.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.place.device)
        with torch.no_grad():
            for images, labels in self.loader.test():
                with self._precision():
                    loss, correct = _loss_and_correct(network, images, labels)
                sums += torch.stack([loss * len(labels), correct, torch.full_like(loss, len(labels))])
        loss, correct, count = self.place.total(sums).tolist()
        return loss / count, 100 * correct / count

    def state_dict(self) -> dict:
        """The state between two steps. Called on every rank; complete on the first."""
        return {
            "settings": self.settings.to_json(),
            "ranks": self.place.ranks,
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "rows": self.rows,
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "frozen": self.frozen.state_dict() if self.frozen else None,
            "frozen_optimizers": [optimizer.state_dict() for optimizer in self.frozen_optimizers],
            "average": [self.average.total, self.average.weight],
            "norms": self.norms,
            "monitor": self.monitor.state_dict() if self.monitor else None,
            "random": torch.get_rng_state(),
            "random_gpus": self.place.random_states(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Resume from a state.

        Raises:
            ValueError: if the state is not that of a run, or of one with other settings or number of ranks.
        """
        if not isinstance(state, dict) or not {"settings", "ranks"} <= state.keys():
            raise ValueError("the checkpoint is that of no run, expected what state_dict returned")
        ranks, then = self.place.ranks, state["ranks"]
        if ranks != then:
            raise ValueError(f"ranks is {ranks}, and was {then} in the checkpoint, expected the same")
        if difference := self.settings.difference(state["settings"]):
            raise ValueError(f"{difference} in the checkpoint, expected the same settings")
        self.epoch, self.step, self.seconds, self.rows = (state[k] for k in ("epoch", "step", "seconds", "rows"))
        self.network.load_state_dict(state["network"])
        if self.frozen:
            self.frozen.load_state_dict(state["frozen"])
        saved = state["optimizers"] + state["frozen_optimizers"]
        for optimizer, each in zip(self.optimizers + self.frozen_optimizers, saved, strict=True):
            optimizer.load_state_dict(each)
        total, self.average.weight = state["average"]
        self.average.total.copy_(total)
        self.norms.copy_(state["norms"])
        if self.monitor:
            self.monitor.load_state_dict(state["monitor"])
        torch.set_rng_state(state["random"])
        if state["random_gpus"]:
            torch.cuda.set_rng_state(state["random_gpus"][self.place.rank])

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        self.step += 1
        loss, correct = self._backward(self.model, images, labels)
        recipe.step(self.optimizers, self.lr)
        if self.frozen_model:
            self._backward(self.frozen_model, images, labels)
            recipe.step(self.frozen_optimizers, self.lr)
        self.average.update(torch.stack([loss, 100 * correct / len(labels)]))
        if self.monitor:
            self.monitor.step()

    def _backward(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with self._precision():
            loss, correct = _loss_and_correct(model, images, labels)
        loss.backward()
        return loss.detach(), correct

    def _row(self) -> dict:
        """One line of the log."""
        train_loss, train_accuracy = self.average.read(self.place)
        test_loss, test_accuracy = self.evaluate(self.network)
        row = {
            "epoch": self.epoch + 1,
            "step": self.steps,
            "lr": self.lr,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "frozen_accuracy": self.evaluate(self.frozen)[1] if self.frozen else None,
            "growth": (models.weight_norms(self.network) / self.norms).mean().item(),
        }
        for name in ("angle", "norm_ratio", "projection_angle", "gradient_angle"):
            row[name] = self._mean_over_layers(name)
        return {**row, "seconds": self.seconds}

    def _mean_over_layers(self, name: str) -> float | None:
        latest = self.monitor.latest.values() if self.monitor else ()
        values = [v for v in (getattr(a, name) for a in latest) if v is not None and math.isfinite(v)]
        return statistics.fmean(values) if values else None

    def _watch(self, images: Images) -> pyfeedback.Monitor:
        if not self.settings.probe:
            return pyfeedback.Monitor(self.network, self.settings.every)
        chosen = [images.test[i] for i in range(min(self.settings.probe, len(images.test)))]
        inputs, labels = (torch.stack([torch.as_tensor(v) for v in side]) for side in zip(*chosen, strict=True))
        probe = inputs.to(self.place.device, memory_format=self.loader.format), labels.to(self.place.device)
        return pyfeedback.Monitor(self.network, self.settings.every, batch=probe, loss=F.cross_entropy)

    def _ready(self, network: nn.Module) -> nn.Module:
        """The network wrapped for training: distributed over the ranks, and compiled if requested."""
        model = self.place.wrap(network)
        return torch.compile(model) if self.settings.compile else model

    def _precision(self):
        return torch.autocast(self.place.device.type, torch.bfloat16) if self.settings.autocast else nullcontext()


def _loss_and_correct(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss and the number of correct predictions."""
    scores = model(images)
    return F.cross_entropy(scores, labels), (scores.argmax(1) == labels).sum()
