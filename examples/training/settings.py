"""The settings of a run, in one dataclass."""

import json
import math
from dataclasses import asdict, dataclass, field

import pyfeedback

DATA = ("digits", "cluttered", "fashion-mnist", "mnist-5k", "mnist", "cifar10", "cifar100", "imagenet")
OPTIMIZERS = ("sgd", "adam", "adamw")


def option(default, help: str):
    """A field with its help text on the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run. The defaults are the recipe of Kunin et al., ICML 2020, and of the authors' code."""

    data: str = option("imagenet", f"one of {', '.join(DATA)}")
    model: str = option("resnet18", "resnet8, 20, 32, 44, 56 or 110 of CIFAR; demo; or a name of torchvision.models")
    rule: pyfeedback.Rule | dict[str, pyfeedback.Rule] = field(
        default=pyfeedback.rule("bp"), metadata={"help": "how feedback weights learn: a name, or several PATTERN=NAME"}
    )
    seed: int = option(0, "seed of weights, feedback, order and augmentation")

    epochs: int = option(90, "passes over the training images")
    batch: int = option(256, "images per step, over all ranks")
    optimizer: str = option("sgd", f"one of {', '.join(OPTIMIZERS)}; adam has L2, adamw a decoupled decay")
    lr: float = option(0.1, "learning rate after the warm-up")
    momentum: float = option(0.9, "momentum of sgd")
    nesterov: bool = option(True, "Nesterov momentum")
    weight_decay: float = option(1e-4, "weight decay of the forward weights; kp needs the same decay in its rule")
    warmup: float = option(5, "epochs of linear warm-up from 0")
    milestones: tuple[int, ...] = option((30, 60, 80), "epochs at which the learning rate is divided by 10")
    cosine: bool = option(False, "a cosine schedule instead of milestones")
    feedback_lr: float | None = option(None, "constant learning rate of a separate SGD of the feedback")
    feedback_momentum: float = option(0.9, "momentum of the separate SGD of the feedback")
    feedback_scale: float = option(1.0, "factor of the initial feedback")
    noise: float = option(0.0, "standard deviation of noise added to the feedback's gradients; sgd only")

    autocast: bool = option(False, "bfloat16 autocast")
    compile: bool = option(False, "torch.compile the model")
    channels_last: bool = option(False, "channels_last memory format")
    deterministic: bool = option(False, "use deterministic algorithms only, for reproducible results on a GPU")

    every: int = option(100, "steps between two readings of the alignment")
    probe: int = option(64, "test images for the projection and gradient angles; 0 disables them")
    frozen: bool = option(True, "also train a classifier on the features of the untrained network")
    smoothing: float = option(0.98, "decay of the moving averages of training loss and accuracy")

    def __post_init__(self):
        for name, choices in {"data": DATA, "optimizer": OPTIMIZERS}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        for name, lowest in {"epochs": 1, "batch": 1, "every": 1, "probe": 0}.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {lowest} or more")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected a 64-bit int")
        if any(milestone < 1 for milestone in self.milestones):
            raise ValueError(f"milestones are {self.milestones}, expected epochs of 1 or more")
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
        """The settings as text, with one field per line."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """Read the output of :meth:`to_json`.

        Raises:
            ValueError: if it is not valid.
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
        """The first field that differs from the settings of :meth:`to_json`, in words."""
        now, then = json.loads(self.to_json()), json.loads(text)
        for name in now:
            if now[name] != then.get(name):
                return f"{name} is {now[name]!r}, and was {then.get(name)!r}"
        return None
