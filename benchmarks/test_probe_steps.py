"""A training step with rules that read probes, with its optimizer, at several ages of a run: layers and whole networks.

A step without an estimate is compared with `plain`, backprop with torch's fused SGD. Estimates are made in the
optimizer's step, so only that is timed with an estimate at each age, and without one (`update`): the difference of two
whole steps would be less than their noise. In the presets, tau grows with the number of steps, so estimates become
rarer and need fewer probes. The tables weight them by their frequency.
"""

import copy
from functools import partial

import pytest
import torch
from implementations import SUBJECT
from networks import MODELS, loss_of, task
from timing import Step
from torch import nn

import pyfeedback
from pyfeedback.testing import conv_inputs

AGES = (250, 1_000, 10_000, 100_000)  # steps; in the presets, tau grows from step 250 on
UPDATE = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}  # small: the steps of a benchmark change nothing


def test_probe_step(race, selection, layer, rule_name):
    if layer.groups > 1:
        pytest.skip("only dense convolutions")
    inputs = conv_inputs(layer, selection.batch, torch.float32, selection.device)
    plain = convolution(layer).to(selection.device, memory_format=torch.channels_last)
    check(copy.deepcopy(plain), rule_name)

    def backward(model):
        torch.autograd.backward(model(inputs.input), inputs.grad_output)
        inputs.input.grad = None

    compare(race, plain, rule_name, backward, layer=layer.name, batch=selection.batch)


@pytest.mark.parametrize("network", list(MODELS))
def test_probe_network_step(race, selection, network, rule_name):
    if network not in selection.whole_networks:
        pytest.skip("not among the networks of this run")
    plain, inputs, labels, info = task(network, selection)

    def backward(model):
        loss_of(model(inputs), labels).backward()

    compare(race, plain, rule_name, backward, layer=network, batch=info["size"], mode="eager", **info)


def compare(race, plain, rule_name, backward, **info):
    """Time the steps of a model and of its conversion."""
    ours = pyfeedback.convert(copy.deepcopy(plain), rule_name)
    optimizer = pyfeedback.optim.SGD(ours, **UPDATE)
    rule = pyfeedback.rule(rule_name)
    every = [rule.every_at(age) for age in AGES]
    assert every[-1] > 1, "the step after the last age must have no estimate"
    backward(ours)
    gradients = {parameter: parameter.grad for parameter in ours.parameters()}

    def prepare(step):
        """Let the next step be the one after ``step``."""
        for group in optimizer.param_groups:
            group["feedback_step"] = step

    def prepare_update(step):
        prepare(step)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    steps = {
        SUBJECT: Step(training_step(ours, optimizer, backward), partial(prepare, AGES[-1])),
        "plain": Step(training_step(plain, torch.optim.SGD(plain.parameters(), fused=True, **UPDATE), backward)),
        "update": Step(optimizer.step, partial(prepare_update, AGES[-1])),
    }
    for age, count in zip(AGES, every, strict=True):  # an estimate is due in multiples of `every`
        steps[str(age)] = Step(optimizer.step, partial(prepare_update, age - age % count - 1))
    group = f"{rule_name} {info['layer']}"
    race("probes", steps, group=group, rule=rule_name, ages=list(AGES), **info)


def convolution(layer):
    torch.manual_seed(0)
    return nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel, *layer.window, bias=False)


def training_step(model, optimizer, backward):
    """The step of a training loop."""

    def run():
        backward(model)
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None

    return run


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
