"""A modelled training step of ResNet-50 on a GPU under each rule, relative to backprop.

Called by roofline.py --step. A step has four parts: the forward passes of the layers, their backward passes, everything
else that the network computes (batch norm, ReLU, sums, pooling, the loss), and the update of W and B by SGD with
momentum. Activations are bfloat16 and parameters float32; each parameter is converted once a step. An update reads and
writes each tensor once, as the one-pass kernels do.
"""

import math
from functools import cache

import networks
import torch
from gpu_layers import NETWORKS
from gpu_model import BATCH, DEVICES, DTYPE, Device, Work, backward_works, seconds, traced
from torch.nn import functional as F

import pyfeedback
from pyfeedback import Rule
from pyfeedback.core.probes import count_probes

RULES = ("fa", "sa", "kp", "wm", "ia", "aa", "wm-probes", "ia-probes", "aa-probes")
TARGETS = dict(zip(RULES, (1.02, 1.02, 1.02, 1.12, 1.25, 1.25, 1.03, 1.03, 1.03), strict=True))
STEPS = 10_000  # of a run with probes: the mean of its estimates
PARTS = 3  # products of bfloat16 for one of a sign with a float32
LAYERS = NETWORKS["resnet50"]
WEIGHTS = sum(layer.repeats * math.prod(layer.weight) for layer in LAYERS)


@cache
def network() -> tuple[list[Work], list[Work]]:
    """The forward passes of the layers, and everything else in a step under backprop but the layers' backward."""
    with torch.device("meta"):
        model = networks.resnet50().to(DTYPE, memory_format=torch.channels_last)
        images = torch.empty(BATCH, 3, 224, 224, dtype=DTYPE).to(memory_format=torch.channels_last)
        labels = torch.zeros(BATCH, dtype=torch.long)
        with traced() as works:
            F.cross_entropy(model(images), labels).backward()
    of_layers = {"convolution", "addmm", "mm", "dgrad", "wgrad"}
    forward = [work for work in works if work.name in ("convolution", "addmm")]
    return forward, [work for work in works if work.name not in of_layers]


def layers(rule: Rule, device: Device, triton: bool) -> float:
    """Seconds of the backward passes of all layers; with ``triton``, by the backend that is modelled to be faster."""
    total = 0.0
    for layer in LAYERS:
        works = backward_works(layer, rule, device)
        times = [seconds(each, device) for name, each in works.items() if triton or name == "composite"]
        total += layer.repeats * min(times)
    return total


def update(rule: Rule | None) -> Work:
    """The update of all W, and of B under a rule, and their conversion to bfloat16; None for backprop."""
    moved = 5 * 4 + 4 + 2  # W and its momentum read and written, its gradient read; converted
    if rule is not None:
        moved += 4 + 2  # the conversion of B
        if rule.learns:
            moved += 4 * 4  # B and its momentum, read and written
            moved += 4 * (rule.reads_data or rule.reads_probes)  # its gradient; W and dW were read for W
    return Work("update", 0.0, moved * WEIGHTS)


def estimates(rule: Rule, device: Device) -> float:
    """Seconds that a step takes for the estimates of a rule that reads probes, the mean of a run.

    The probes are signs, drawn where they are read. Each part is one launch for all layers: the response; with null,
    the moments; and the gradient, which reads W and B and is written.
    """
    total = 0.0
    ages = sorted({int(STEPS * (i + 0.5) / 200) for i in range(200)})
    for age in ages:
        every, products, stored = rule.every_at(age), 0.0, 0.0
        for layer in LAYERS:
            k, inputs = layer.weight[0], math.prod(layer.weight[1:])
            positions = layer.geometry.sizes((BATCH, *layer.input), layer.weight, 0).positions
            m = count_probes(0, inputs, 1 / rule.tau_at(age), every, rule.null != 0, positions, rule.orthogonal,
                             has_sparse=rule.sparse != 0).probes  # fmt: skip
            products += layer.repeats * PARTS * 2 * m * k * (2 * inputs + (min(k, inputs) + inputs) * (rule.null != 0))
            stored += layer.repeats * 4 * m * k
        launches = 2 + (rule.null != 0)
        work = Work("estimate", products / launches, (3 * 4 * WEIGHTS + 2 * stored) / launches)
        total += launches * work.seconds(device) / every
    return total / len(ages)


def report(name: str, centered: bool = True) -> list[str]:
    """The step of each rule as text; without the centering of the presets if not ``centered``."""
    device = DEVICES[name]
    forward, others = (seconds(works, device) for works in network())
    backprop = forward + others + layers(pyfeedback.rule("bp"), device, False) + update(None).seconds(device)
    lines = [
        f"A training step of ResNet-50 on {name}, {BATCH} images, bfloat16: modelled and unmeasured",
        f"  backprop {1e3 * backprop:.2f} ms: forward passes {1e3 * forward:.2f}, their backward "
        f"{1e3 * layers(pyfeedback.rule('bp'), device, False):.2f}, update {1e3 * update(None).seconds(device):.2f}, "
        f"batch norm and all else {1e3 * others:.2f}",
        f"  relative to it {'composition':>16}{'faster of it and Triton':>26}{'target':>9}",
    ]
    for rule_name in RULES:
        rule = pyfeedback.rule(rule_name)
        rule = rule if centered else pyfeedback.rule(rule, center=False)
        fixed = forward + others + update(rule).seconds(device)
        fixed += estimates(rule, device) if rule.reads_probes else 0.0
        composed, best = ((fixed + layers(rule, device, triton)) / backprop for triton in (False, True))
        met = "met" if best <= TARGETS[rule_name] else "missed"
        lines.append(f"  {rule_name:14} {composed:16.3f}{best:26.3f}{TARGETS[rule_name]:9.2f} {met}")
    return lines
