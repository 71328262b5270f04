"""A training step of one layer whose rule reads probes, with its optimizer, at several ages of a run.

In the presets, tau grows with the number of steps, so estimates become rarer and need fewer probes. A step with an
estimate is timed at each age, as is one without (`no estimate`). The tables weight them by their frequency. `plain` is
backprop with torch's fused SGD.
"""

import copy

import pytest
import torch
from implementations import SUBJECT
from timing import Step
from torch import nn

import pyfeedback
from pyfeedback.testing import conv_inputs

AGES = (100, 1_000, 10_000, 100_000)  # steps
UPDATE = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}  # small: the steps of a benchmark change nothing


def test_probe_step(race, selection, layer, rule_name):
    if layer.groups > 1:
        pytest.skip("only dense convolutions")
    inputs = conv_inputs(layer, selection.batch, torch.float32, selection.device)
    plain = convolution(layer).to(selection.device, memory_format=torch.channels_last)
    check(copy.deepcopy(plain), rule_name)
    ours = pyfeedback.convert(copy.deepcopy(plain), rule_name)
    optimizer = pyfeedback.optim.SGD(ours, **UPDATE)
    rule = ours.rule
    every = [rule.every_at(age) for age in AGES]
    # `feedback_step` is that of the step before; an estimate is due in multiples of `every`.
    starts = {f"step {age}": age - age % count - 1 for age, count in zip(AGES, every, strict=True)}
    steps = {name: training_step(ours, optimizer, inputs, start) for name, start in starts.items()}
    steps[SUBJECT] = training_step(ours, optimizer, inputs, AGES[-1])
    steps["plain"] = training_step(plain, torch.optim.SGD(plain.parameters(), fused=True, **UPDATE), inputs)
    assert every[-1] > 1, "the last step must have no estimate"
    race(
        "probes",
        steps,
        group=f"{rule_name} {layer.name}",
        layer=layer.name,
        rule=rule_name,
        batch=selection.batch,
        every=dict(zip(starts, every, strict=True)),
    )


def convolution(layer):
    torch.manual_seed(0)
    return nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel, *layer.window, bias=False)


def training_step(model, optimizer, inputs, start=None):
    """The step of a training loop, from step number ``start``."""

    def prepare():
        for group in optimizer.param_groups if start is not None else ():
            group["feedback_step"] = start

    def run():
        torch.autograd.backward(model(inputs.input), inputs.grad_output)
        optimizer.step()
        inputs.input.grad = None
        for parameter in model.parameters():
            parameter.grad = None

    return Step(run, prepare)


def check(plain, rule_name):
    """One step of B in float32 is that in float64, with the same probes."""
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = pyfeedback.convert(copy.deepcopy(plain), rule_name).to(dtype)
        pyfeedback.optim.SGD(model, **UPDATE).step()
        found.append(model.feedback.detach().double())
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert error <= 1e-5, f"relative error {error:.1e}"
