"""What decides a run, in one dataclass."""

import json
import math
from dataclasses import asdict, dataclass, field

import pyfeedback

DATA = ("digits", "cluttered", "mnist", "cifar10", "cifar100", "imagenet")
OPTIMIZERS = ("sgd", "adam", "adamw")


def option(default, help: str):
    """A field that the command line takes too."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides a run. The defaults are the paper's recipe: Kunin et al., ICML 2020, and its authors' code."""

    data: str = option("imagenet", f"one of {', '.join(DATA)}")
    model: str = option("resnet18", "resnet8, 20, 32, 44, 56 or 110 of CIFAR; demo; or a name of torchvision.models")
    rule: pyfeedback.Rule | dict[str, pyfeedback.Rule] = field(
        default=pyfeedback.rule("bp"), metadata={"help": "how feedback weights learn: a name, or several PATTERN=NAME"}
    )
    seed: int = option(0, "of weights, feedback, order and augmentation")

    epochs: int = option(90, "passes over the training images")
    batch: int = option(256, "images of a step, of all ranks together")
    optimizer: str = option("sgd", f"one of {', '.join(OPTIMIZERS)}; adam has L2, adamw a decoupled decay")
    lr: float = option(0.1, "learning rate behind the warm-up")
    momentum: float = option(0.9, "of sgd")
    nesterov: bool = option(True, "Nesterov's form of momentum")
    weight_decay: float = option(1e-4, "of the forward weights; kp wants it equal to its rule's decay")
    warmup: float = option(5, "epochs in which the learning rate rises from 0")
    milestones: tuple[int, ...] = option((30, 60, 80), "epochs at which the learning rate is divided by 10")
    cosine: bool = option(False, "the learning rate falls along a cosine instead")
    feedback_lr: float | None = option(None, "a constant learning rate of the feedback's own SGD; else as the weights'")
    feedback_momentum: float = option(0.9, "of the feedback's own SGD")
    feedback_scale: float = option(1.0, "multiplies the feedback as it is drawn")
    noise: float = option(0.0, "standard deviation of noise in the feedback's gradients, under sgd")

    autocast: bool = option(False, "compute in bfloat16 where that is safe")
    compile: bool = option(False, "torch.compile the model")
    channels_last: bool = option(False, "lay images out channels last")
    deterministic: bool = option(False, "deterministic algorithms alone, so that a GPU too repeats itself bit by bit")

    every: int = option(100, "steps from one reading of the alignment to the next")
    probe: int = option(64, "test images for the projection and gradient angles; 0 leaves them out")
    frozen: bool = option(True, "train a classifier on the untrained network's features beside it")
    smoothing: float = option(0.98, "decay of the moving averages of training loss and accuracy")

    def __post_init__(self):
        for name, choices in {"data": DATA, "optimizer": OPTIMIZERS}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        for name, lowest in {"epochs": 1, "batch": 1, "every": 1, "probe": 0}.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {lowest} or more")
        numbers = ("lr", "momentum", "weight_decay", "warmup", "noise")
        for name in (*numbers, "feedback_lr", "feedback_momentum", "feedback_scale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}, expected a finite number, 0 or more")
        if self.noise and self.optimizer != "sgd" and self.feedback_lr is None:
            raise ValueError(f"noise is {self.noise} with {self.optimizer}, expected sgd or a feedback_lr")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}, expected a number from 0 to below 1")

    def to_json(self) -> str:
        """The settings as text, a field to a line."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """The settings of :meth:`to_json`.

        Raises:
            ValueError: it is none.
        """
        try:
            values = json.loads(text)
            rule = values.pop("rule")
            mixed = all(isinstance(value, dict) for value in rule.values())
            rule = {p: pyfeedback.Rule(**r) for p, r in rule.items()} if mixed else pyfeedback.Rule(**rule)
            return cls(**{**values, "rule": rule, "milestones": tuple(values["milestones"])})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"settings are {text[:40]!r}, expected those that a run has written: {error}") from None

    def difference(self, text: str) -> str | None:
        """The first field in which the settings of :meth:`to_json` differ, in words."""
        now, then = json.loads(self.to_json()), json.loads(text)
        for name in now:
            if now[name] != then.get(name):
                return f"{name} is {now[name]!r}, and was {then.get(name)!r}"
        return None
