"""What decides a run: one dataclass, and named configurations of published recipes."""

import json
import math
from dataclasses import asdict, dataclass, field, replace

import tuned

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
    rule: pyfeedback.Rule = field(default=pyfeedback.rule("bp"), metadata={"help": "how feedback weights learn"})
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
        for name in ("lr", "momentum", "weight_decay", "warmup", "feedback_lr", "feedback_momentum"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}, expected a finite number, 0 or more")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}, expected a number from 0 to below 1")

    def to_json(self) -> str:
        """The settings as text, a field to a line."""
        return json.dumps(asdict(self), indent=1)

    def difference(self, text: str) -> str | None:
        """The first field in which the settings of :meth:`to_json` differ, in words."""
        now, then = json.loads(self.to_json()), json.loads(text)
        for name in now:
            if now[name] != then.get(name):
                return f"{name} is {now[name]!r}, and was {then.get(name)!r}"
        return None


def _configurations() -> dict[str, tuple[Settings, str]]:
    """Settings and their source, by name."""
    found: dict[str, tuple[Settings, str]] = {}
    for name in ("bp", "fa", "wm", "ia", "sa", "aa", "kp"):
        # Kolen-Pollack: both weights must decay at the same rate
        rule = pyfeedback.rule(name, decay=1e-4) if name == "kp" else pyfeedback.rule(name)
        found[f"imagenet-{name}"] = Settings(rule=rule), "Kunin et al. 2020: ResNet-18, the authors' coefficients"

    he = Settings(data="cifar10", model="resnet20", epochs=164, batch=128, nesterov=False, warmup=0,
                  milestones=(82, 123))  # fmt: skip
    found["cifar10"] = he, "He et al. 2016, section 4.2: 64 000 steps, /10 at 32 000 and 48 000"

    biotorch = replace(he, epochs=250, milestones=(100, 150, 200), rule=pyfeedback.rule("fa"))
    source = "BioTorch, benchmark_configs/cifar10/resnet_20"
    found["biotorch-cifar10"] = biotorch, f"{source}/sgd"
    found["biotorch-cifar10-adam"] = replace(biotorch, optimizer="adam", lr=1e-3), f"{source}/adam"
    found["biotorch-imagenet"] = (
        Settings(epochs=75, nesterov=False, warmup=0, milestones=(20, 40, 60), rule=pyfeedback.rule("fa")),
        "BioTorch, Benchmarks.md",
    )

    for data, epochs in {"digits": 30, "cluttered": 12}.items():
        for name, setting in tuned.SETTINGS.items():
            found[f"{data}-{name}"] = _demo(data, epochs, setting), "examples/two_routes.py"
    return found


def _demo(data: str, epochs: int, setting: tuned.Setting) -> Settings:
    """The demo's recipe; where its feedback steps as the weights do, one optimizer steps both."""
    own = setting.rule.learns and not setting.cosine
    return Settings(
        data=data, model="demo", rule=setting.rule, epochs=epochs, batch=64, lr=tuned.LR, momentum=tuned.MOMENTUM,
        nesterov=False, weight_decay=setting.weight_decay, warmup=0, milestones=(), cosine=True, every=20,
        feedback_lr=setting.lr if own else None, feedback_momentum=setting.momentum if own else 0.9,
    )  # fmt: skip


CONFIGURATIONS = _configurations()
