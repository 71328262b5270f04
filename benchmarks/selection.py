"""The selection of a run: layers, rules, batch, rounds and device, from the command line."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from implementations import BASELINES, SUBJECT

from pyfeedback import Rule
from pyfeedback import rule as as_rule
from pyfeedback.testing import (
    CONVNEXT_T,
    EFFICIENTNET_B0,
    MOBILENET_V2,
    RESNET18,
    RESNET20_CIFAR,
    RESNET50,
    ConvShape,
)

RESNETS = {"resnet18": RESNET18, "resnet50": RESNET50, "resnet20": RESNET20_CIFAR}
DEPTHWISE = {"mobilenet_v2": MOBILENET_V2, "efficientnet_b0": EFFICIENTNET_B0, "convnext_t": CONVNEXT_T}
NETWORKS = RESNETS | DEPTHWISE  # of DEPTHWISE only the depthwise layers, and only if named

WHOLE_NETWORKS = (*RESNETS, "resnet18-cifar", "demo", "mlp", "convnext", "vit-tiny", "gpt")

# The sample of a run without --full or --network: small networks, and one layer of each kind: pointwise up, down and
# strided, 3x3 dense and strided, large and small maps.
SAMPLE_SECONDS = 540.0  # after which no benchmark starts
SAMPLE_NETWORKS = ["demo", "resnet20", "mlp", "convnext", "gpt"]
SAMPLE_LAYERS = {
    "resnet50": ("64-256-1x1s1@56", "512-128-1x1s1@28", "128-128-3x3s1@28", "1024-2048-1x1s2@14"),
    "resnet18": ("256-512-3x3s2@14",),
    "resnet20": ("16-16-3x3s1@32", "64-64-3x3s1@8"),
}

FRACTION = 1 / 8
PROBES = ("wm-probes", "ia-probes", "aa-probes")  # they cost something only in the step of an optimizer
RULES: dict[str, Rule] = {name: as_rule(name) for name in ("bp", "fa", "wm", "ia", "sa", "aa", "kp", *PROBES)} | {
    f"{name}/8": as_rule(name, samples=FRACTION) for name in ("wm", "ia", "aa")
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Selection:
    """The command-line options, with the defaults of the device."""

    device: torch.device
    quick: bool = False
    full: bool = False
    timed: bool = True
    compiled: bool = False
    backward_only: bool = False
    processor_time: bool = False
    contiguous: bool = False
    batch: int = 0
    networks: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    budget: float = 0.0
    time_limit: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        cuda = self.device.type == "cuda"
        self.sampled = self.quick or not (self.full or self.networks)
        self.whole_networks = self.networks or (SAMPLE_NETWORKS if self.sampled else list(WHOLE_NETWORKS))
        self.batch = self.batch or (2 if not self.timed else 8 if self.quick else 128 if cuda else 16)
        self.networks = self.networks or list(WHOLE_NETWORKS)
        self.rules = self.rules or list(RULES)
        self.dtypes = self.dtypes or (["bfloat16", "float32"] if cuda else ["float32"])
        self.against = self.against or list(BASELINES[:3])
        self.time_limit = self.time_limit or (SAMPLE_SECONDS if self.sampled and self.timed else float("inf"))
        if self.compiled and "compiled" not in self.against:
            self.against.append("compiled")

    def layers(self) -> list[ConvShape]:
        """The distinct layers of the networks."""
        chosen = {}
        for network in self.networks:
            for shape in NETWORKS.get(network, ()):
                if not self.sampled or shape.name in SAMPLE_LAYERS.get(network, (shape.name,)):
                    chosen.setdefault(shape.name, shape)
        return list(chosen.values())

    def implementations(self, rule: Rule) -> list[str]:
        """pyfeedback and the implementations it is compared with; under backprop, torch alone."""
        return [SUBJECT, *(name for name in self.against if name == "plain" or not rule.transport)]

    def rounds(self, seconds: float) -> int:
        """The number of rounds to measure, given the duration of one."""
        if self.device.type == "cuda":
            least, most, budget = (10, 30, 0.2) if self.quick else (10, 200, 1.0)
        else:
            least, most, budget = (3, 40, 0.2) if self.quick else (5, 50, 0.5 if self.sampled else 2.5)
        budget = self.budget or budget
        return min(max(int(budget / max(seconds, 1e-9)), least), most)

    def out_of_time(self) -> bool:
        """Whether the time limit of the run has passed."""
        return time.monotonic() - self.started > self.time_limit
