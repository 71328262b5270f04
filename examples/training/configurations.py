"""Named settings: published recipes with their sources, and the settings of the demo."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import tuned

import pyfeedback
from training.settings import Settings


class Configuration(NamedTuple):
    """Settings and their source."""

    settings: Settings
    source: str


HE = Configuration(
    Settings(data="cifar10", model="resnet20", epochs=164, batch=128, nesterov=False, warmup=0, milestones=(82, 123)),
    "He et al. 2016, section 4.2: 64 000 steps, /10 at 32 000 and 48 000",
)


# Coefficients of rules that read activations, per position (reduction "mean"). The authors' 1e-3 and 2e-3 are summed
# over positions, and steps overshoot: |B| / |W| is infinite within five steps of ia or aa and within fifteen of wm. A
# step along the largest curvature is stable if lr * coefficient * lambda / (1 - momentum) < 2. In a new ResNet-18 on
# crops of photos, lambda is at most 1270 for sparse and 201 for the centered null, so 2e-4 gives 0.25 and 0.04. The
# margin allows for growing activations. The decay of ia keeps its ratio to null in the last stage, which has 49
# positions. The fixed point of wm is amp / decay times the second moment (at most 186) times W.
PER_POSITION = {
    "wm": {"amp": 5e-5, "decay": 2e-3},
    "ia": {"amp": 2e-4, "null": 2e-4, "decay": 4e-6},
    "aa": {"amp": 2e-4, "sparse": 2e-4},
}


def of_paper() -> Iterator[tuple[str, Configuration]]:
    """ResNet-18 on ImageNet under each rule, and under the rules that read white noise."""
    for name in ("bp", "fa", "wm", "ia", "sa", "aa", "kp", "wm-probes", "ia-probes", "aa-probes"):
        source = "Kunin et al. 2020, the authors' coefficients"
        rule = pyfeedback.rule(name)
        if name == "kp":  # both weights decay at the same rate
            rule = pyfeedback.rule(name, decay=Settings.weight_decay)
        elif name in PER_POSITION:
            rule = pyfeedback.rule(name, reduction="mean", **PER_POSITION[name])
            source = "Kunin et al. 2020, with coefficients of our own: the authors' diverge"
        elif rule.reads_probes:
            source = "Kunin et al. 2020, with a rule of our own that has no units"
        yield f"imagenet-{name}", Configuration(Settings(rule=rule), source)


def of_biotorch() -> Iterator[tuple[str, Configuration]]:
    """ResNet-20 on CIFAR-10 and ResNet-18 on ImageNet."""
    cifar = replace(HE.settings, epochs=250, milestones=(100, 150, 200))
    imagenet = Settings(epochs=75, nesterov=False, warmup=0, milestones=(20, 40, 60))
    configs = "BioTorch, benchmark_configs/cifar10/resnet_20"
    for name in ("bp", "fa", "usf", "frsf", "brsf", "dfa"):
        rule, direct = pyfeedback.rule(name), name == "dfa"
        sgd = replace(cifar, rule=rule, lr=0.001 if direct else 0.1)
        yield f"biotorch-cifar10-{name}", Configuration(sgd, f"{configs}/sgd")
        adam = replace(cifar, rule=rule, lr=0.001, optimizer="adam")
        yield f"biotorch-cifar10-{name}-adam", Configuration(adam, f"{configs}/adam")
        large = replace(imagenet, rule=rule, **({"lr": 0.001, "optimizer": "adam"} if direct else {}))
        yield f"biotorch-imagenet-{name}", Configuration(large, "BioTorch, Benchmarks.md")


def of_demo() -> Iterator[tuple[str, Configuration]]:
    """The demo's network and data under the coefficients of the paper, tuned for them.

    If the feedback uses the options of the weights, one optimizer updates both.
    """
    demo = Settings(
        model="demo", batch=64, lr=tuned.LR, momentum=tuned.MOMENTUM, nesterov=False, warmup=0, milestones=(),
        cosine=True, every=20,
    )  # fmt: skip
    for data, epochs in (("digits", 30), ("cluttered", 12)):
        for name, tune in tuned.WITH_UNITS.items():
            found = replace(
                demo, data=data, epochs=epochs, rule=tune.rule, weight_decay=tune.weight_decay, noise=tune.noise,
                feedback_scale=tune.init.scale if tune.init else 1.0,
            )  # fmt: skip
            if tune.rule.learns and not tune.cosine:
                found = replace(found, feedback_lr=tune.lr, feedback_momentum=tune.momentum)
            yield f"{data}-{name}", Configuration(found, "examples/tuned.py")


CONFIGURATIONS = {"cifar10": HE, **dict(of_paper()), **dict(of_biotorch()), **dict(of_demo())}
