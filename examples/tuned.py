"""The network of the demo, and the setting of each rule for it."""

from dataclasses import dataclass

from torch import nn

import pyfeedback

LR, MOMENTUM = 0.05, 0.9  # of the forward weights, under every rule


@dataclass(frozen=True)
class Setting:
    """A rule with its coefficients, and the optimizer options of its feedback weights."""

    rule: pyfeedback.Rule
    lr: float = 0.0
    momentum: float = 0.0
    cosine: bool = False  # the learning rate of the feedback follows the schedule of the forward weights
    noise: float = 0.0  # standard deviation of the noise added to each gradient of the feedback
    weight_decay: float = 0.002  # of the forward weights
    init: pyfeedback.Init | None = None  # of the feedback


# Rules that read data average over positions ("mean") and center activations: one coefficient fits every layer.
DATA = {"reduction": "mean", "center": True}
SETTINGS = {
    "bp": Setting(pyfeedback.rule("bp")),
    "fa": Setting(pyfeedback.rule("fa")),
    # Without units (docs/rules.md). wm, ia and aa are the presets that read white noise; they need no number.
    "wm": Setting(pyfeedback.rule("wm-probes")),
    "ia": Setting(pyfeedback.rule("ia-probes")),
    "aa": Setting(pyfeedback.rule("aa-probes")),
    # Time constants chosen on validation digits. With tau = 1, sa would copy W to B.
    "sa": Setting(pyfeedback.rule("sa", tau=5.0)),
    "kp": Setting(pyfeedback.rule("kp", tau=100.0)),
}
PAPER = ("bp", "fa", "wm", "ia", "sa", "aa", "kp")  # the rules of Kunin et al., 2020
SETTINGS |= {
    "oja": Setting(pyfeedback.rule("oja", amp=1.0, null=1.0, **DATA), lr=0.005, momentum=0.9),
    "usf": Setting(pyfeedback.rule("usf")),
    "frsf": Setting(pyfeedback.rule("frsf")),
    "brsf": Setting(pyfeedback.rule("brsf")),
    "pfa": Setting(pyfeedback.rule("pfa", decay=0.005), lr=LR, momentum=MOMENTUM, cosine=True, weight_decay=0.005),
    # The best of the scales 0.01, 0.03, 0.1 and 10 after eight epochs.
    "dfa": Setting(pyfeedback.rule("dfa"), init=pyfeedback.Init(scale=0.1)),
}

# The same rules with the coefficients of the paper, for study.py and the training program.
WITH_UNITS = SETTINGS | {
    # Only the decay bounds B, so amp must be small: at ten times this value B diverges. The best of about 30.
    "wm": Setting(pyfeedback.rule("wm", amp=0.01, decay=0.012, **DATA), lr=0.005, momentum=0.9),
    # amp = null is Oja's subspace rule, which bounds B; the decay only stabilizes the weakest directions. A third of
    # these coefficients does nearly as well; twice as much overshoots with some seeds.
    "ia": Setting(pyfeedback.rule("ia", amp=1.0, null=1.0, decay=0.03, **DATA), lr=0.005, momentum=0.9),
    # B follows W with a time constant of 1 / (lr * decay) = 50 steps.
    "sa": Setting(pyfeedback.rule("sa", self_=1.0, decay=1.0), lr=0.02),
    # Stable if lr * sparse * (largest variance of a patch) < 2 * (1 + momentum). At half the step, B lags behind W.
    "aa": Setting(pyfeedback.rule("aa", amp=2.0, sparse=2.0, **DATA), lr=0.02, momentum=0.9),
    # B and W have the same steps and decay: W - B decays with a time of 1 / (lr / (1 - momentum) * decay) = 400 steps.
    "kp": Setting(pyfeedback.rule("kp", decay=0.005), lr=LR, momentum=MOMENTUM, cosine=True, weight_decay=0.005),
}


def network(size: int, width: int = 16, repeats: int = 1) -> nn.Sequential:
    """Convolutions with batch norm and a linear layer, for ``size`` x ``size`` images with one channel.

    The stem has ``width`` channels. The map is halved twice, and the number of channels doubles each time. At each of
    the three map sizes there are ``repeats`` more convolutions: 4 + 3 * ``repeats`` layers with weights.
    """

    def block(inputs, outputs, stride):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    stem = block(1, width, 2 if size > 16 else 1)
    body = [block(width, width, 1) for _ in range(repeats)]
    for inputs in (width, 2 * width):
        body += [block(inputs, 2 * inputs, 2), *(block(2 * inputs, 2 * inputs, 1) for _ in range(repeats))]
    return nn.Sequential(stem, nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)))
