"""Later steps of the optimizers repeat the calls of an earlier one, bit for bit."""

import copy
import weakref

import pytest
import torch
from torch import nn

import pyfeedback
from pyfeedback import optim

OPTIMIZERS = {
    "SGD": lambda model: optim.SGD(model, lr=0.1, momentum=0.9, weight_decay=2e-3),
    "AdamW": lambda model: optim.AdamW(model, lr=0.01, weight_decay=2e-3),
}
RULES = ("fa", "sa", "kp", "ia")


def model_of(rule):
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.Linear(5, 3),
    )
    return pyfeedback.convert(nn.Sequential(*layers), rule)


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(6, 2, 6, 6)).square().mean().backward()
    optimizer.step()


def freeze(model, optimizer):
    model[4].weight.requires_grad_(False)


def learn_again(model, optimizer):
    model[4].weight.requires_grad_(True)


def decrease_rate(model, optimizer):
    for group in optimizer.param_groups:
        group["lr"] *= 0.5


def change_one_rate(model, optimizer):
    optimizer.param_groups[0]["lr"] *= 0.5


def change_decay(model, optimizer):
    optimizer.param_groups[-1]["weight_decay"] = 0.1


def change_rule(model, optimizer):
    model[5].rule = pyfeedback.rule("sa")


def load(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def forget(model, optimizer):
    optimizer.state.clear()


def freeze_feedback(model, optimizer):
    model[0].feedback.requires_grad_(False)


CHANGES = (
    freeze, learn_again, decrease_rate, change_one_rate, change_decay, load, forget, freeze_feedback, change_rule,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_repeated_steps_are_bit_for_bit_those_that_examine_every_parameter(name, rule, monkeypatch):
    model = model_of(rule)
    twin = copy.deepcopy(model)
    optimizer, examining = OPTIMIZERS[name](model), OPTIMIZERS[name](twin)
    monkeypatch.setattr(examining, "_can_replay", False)
    for i, change in enumerate(CHANGES):
        for m, o in ((model, optimizer), (twin, examining)):
            for seed in range(3):
                step(m, o, 3 * i + seed)
            change(m, o)
            step(m, o, 100 + i)
        for (key, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(found, expected), (change.__name__, key)
    assert examining._replay is None


@pytest.mark.parametrize("rule", RULES)
def test_parameters_are_examined_once(rule, monkeypatch):
    model = model_of(rule)
    optimizer = OPTIMIZERS["SGD"](model)
    examined, calls = [], optimizer._calls
    monkeypatch.setattr(optimizer, "_calls", lambda: (examined.append(1), calls())[1])
    for seed in range(4):
        step(model, optimizer, seed)
        decrease_rate(model, optimizer)  # as a schedule of the learning rate does
    assert len(examined) == 1


def test_gradients_are_not_kept():
    model = model_of("kp")
    optimizer = OPTIMIZERS["SGD"](model)
    for seed in range(2):
        step(model, optimizer, seed)
        gradients = [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
        optimizer.zero_grad()
        assert gradients
        assert not any(gradient() for gradient in gradients)


@pytest.mark.parametrize("rule", ["ia-probes", pyfeedback.rule("sa", tau=5.0), pyfeedback.rule("kp", tau=50.0), "pfa"])
def test_rules_with_a_time_constant_or_a_factor_are_examined_in_every_step(rule):
    model = model_of(rule)
    optimizer = optim.SGD(model, lr=0.1, momentum=0.9)
    step(model, optimizer, 0)
    assert optimizer._replay is None


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["kp", "ia", "ia-probes"])
def test_an_unconverted_model_is_stepped_as_by_torch(rule, kind):
    model, _other = model_of(rule), model_of(rule)  # another model is still converted
    own = OPTIMIZERS[kind](model)
    step(model, own, 0)
    twin = copy.deepcopy(pyfeedback.unconvert(model))
    theirs = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[kind](twin.parameters(), lr=0.01, weight_decay=0.1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        theirs.state[q] = copy.deepcopy(own.state[p])
    for group in (*own.param_groups, *theirs.param_groups):
        group |= {"lr": 0.01, "weight_decay": 0.1} | ({"momentum": 0.9} if kind == "SGD" else {})
    for seed in (1, 2):
        step(model, own, seed)
        step(twin, theirs, seed)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 1, 2])  # as an unconverted model
def test_a_model_that_is_converted_again_needs_a_new_optimizer(kind, steps):
    model = model_of("sa")
    optimizer = OPTIMIZERS[kind](model)
    step(model, optimizer, 0)
    pyfeedback.unconvert(model)
    assert optimizer.time_constants() == optimizer.probe_counts() == {}
    for seed in range(steps):
        step(model, optimizer, seed)
    pyfeedback.convert(model, "sa")
    with pytest.raises(RuntimeError, match=r"^0 has another feedback weight now, expected an optimizer"):
        step(model, optimizer, 0)


def test_a_model_converted_to_another_rule_needs_a_new_optimizer():
    model = model_of("ia")
    optimizer = OPTIMIZERS["SGD"](model)
    pyfeedback.convert(model, "aa")
    with pytest.raises(RuntimeError, match="has another feedback weight now"):
        optimizer.step()


def test_a_model_with_assigned_parameters_needs_a_new_optimizer():
    model = model_of("sa")
    optimizer = OPTIMIZERS["SGD"](model)
    step(model, optimizer, 0)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match=r"load_state_dict\(assign=True\)$"):
        step(model, optimizer, 0)
