"""Warnings about training that does not do what its user expects: pyfeedback/guard.py."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from small_networks import perceptron
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import pyfeedback
from pyfeedback import guard

LEARNING = ["ia", "wm", "aa", "sa", "kp"]


@pytest.fixture(autouse=True)
def on():
    pyfeedback.set_guard(True)
    yield
    pyfeedback.set_guard(True)


def train(model, optimizer, steps=4, scaler=None, before_step=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 4)).square().sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        before_step()
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.01, **options)


# What is right gives no warning


@pytest.mark.parametrize("rule", [*LEARNING, "oja", "fa", "usf", "pfa", "dfa", "bp", "ia-probes"])
@pytest.mark.parametrize("make", [pyfeedback.optim.SGD, pyfeedback.optim.AdamW])
def test_training_with_our_optimizers_gives_no_warning(make, rule, caplog):
    model = pyfeedback.convert(perceptron(4, 8, 4), rule)
    optimizer = sgd(model) if rule in ("bp", "dfa") else make(model, lr=0.01, weight_decay=2e-3)
    train(model, optimizer, 12)
    assert caplog.messages == []


@pytest.mark.parametrize("rule", LEARNING)
def test_training_with_torch_optim_gives_no_warning(rule, caplog):
    model = pyfeedback.convert(perceptron(4, 8, 4), rule)
    train(model, sgd(model, weight_decay=2e-3 if rule == "kp" else 0.0))
    assert caplog.messages == []


@pytest.mark.parametrize("rule", [*LEARNING, "fa"])
def test_two_optimizers_give_no_warning(rule, caplog):
    model = pyfeedback.convert(perceptron(4, 8, 4), rule)
    rest = torch.optim.SGD(pyfeedback.forward_parameters(model), lr=0.01, weight_decay=2e-3)
    feedback = pyfeedback.optim.FeedbackSGD(model, lr=0.01)
    train(model, rest, before_step=feedback.step)
    assert caplog.messages == []


@pytest.mark.parametrize("rule", LEARNING)
def test_a_scaler_with_our_optimizer_gives_no_warning_although_it_skips_steps(rule, caplog):
    model = pyfeedback.convert(perceptron(4, 8, 4), rule)
    optimizer = pyfeedback.optim.SGD(model, lr=0.01, weight_decay=2e-3)
    overflows = iter([True, True, True, False, False, False])

    def before_step():
        if next(overflows):
            model[0].weight.grad.fill_(torch.inf)

    train(model, optimizer, 6, torch.amp.GradScaler("cpu"), before_step)
    assert caplog.messages == []


def test_a_frozen_feedback_or_weight_gives_no_warning(caplog):
    model = pyfeedback.convert(perceptron(4, 8, 4), "ia")
    model[0].feedback.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    train(model, sgd(model))
    assert caplog.messages == []


def test_a_parametrized_weight_gives_no_warning(caplog):
    layer = pyfeedback.convert(nn.Linear(4, 4), "ia")
    nn.utils.parametrizations.weight_norm(layer)
    train(layer, sgd(layer))
    assert caplog.messages == []


def test_a_schedule_that_starts_later_gives_no_warning(caplog):
    model = pyfeedback.convert(perceptron(4, 8, 4), "ia")
    schedule = pyfeedback.schedules.Schedule(model, amp=lambda step: 0.0, null=lambda step: 0.0, decay=lambda step: 0.0)
    optimizer = pyfeedback.optim.SGD(model, lr=0.01)
    train(model, optimizer, before_step=schedule.step)
    assert caplog.messages == []


def test_an_optimizer_of_another_model_is_not_examined(caplog):
    pyfeedback.convert(perceptron(4, 8, 4), "ia")
    other = perceptron(4, 8, 4)
    train(other, sgd(other))
    assert caplog.messages == []


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_elements_is_not_searched(caplog):
    model = pyfeedback.convert(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4)), "sa")
    train(model, pyfeedback.optim.SGD(model, lr=0.01), 12)
    assert caplog.messages == []


# What is wrong gives one warning, with the names of the layers


@pytest.mark.parametrize("rule", LEARNING)
def test_an_optimizer_built_before_convert(rule, caplog):
    model = perceptron(4, 8, 4)
    optimizer = sgd(model)
    pyfeedback.convert(model, rule)
    train(model, optimizer, 8)
    (message,) = caplog.messages
    assert message == f"0, 2: {guard.NO_OPTIMIZER}"


def test_a_parametrized_weight_is_examined_too(caplog):
    layer = pyfeedback.convert(nn.Linear(4, 4), "ia")
    nn.utils.parametrizations.weight_norm(layer)
    train(layer, torch.optim.SGD(pyfeedback.forward_parameters(layer), lr=0.01))
    assert [message.split(": ", 1)[1] for message in caplog.messages] == [guard.NO_OPTIMIZER]


@pytest.mark.parametrize("kind", ["lstm", "standardized"])
def test_weights_that_a_module_multiplies_itself(kind, caplog):
    class Standardized(nn.Linear):
        def forward(self, x):
            return x @ ((self.weight - self.weight.mean()) / self.weight.std()).t() + self.bias

    model = nn.LSTM(4, 4) if kind == "lstm" else Standardized(4, 4)
    optimizer = sgd(model)
    pyfeedback.convert(model, "ia")
    for _ in range(3):
        optimizer.zero_grad()
        out = model(torch.randn(3, 2, 4))
        (out[0] if kind == "lstm" else out).square().sum().backward()
        optimizer.step()
    (message,) = caplog.messages
    assert message == f"{'weight_ih_l0, weight_hh_l0' if kind == 'lstm' else 'weight'}: {guard.NO_OPTIMIZER}"


@pytest.mark.parametrize("rule", [*LEARNING, "fa", "ia-probes"])
@pytest.mark.parametrize("make", [sgd, lambda m, **options: torch.optim.AdamW(m.parameters(), **options)])
@pytest.mark.parametrize("before", [True, False])
def test_following_an_optimizer_gives_no_warning(rule, make, before, caplog):
    model = perceptron(4, 8, 4)
    if not before:
        pyfeedback.convert(model, rule)
    optimizer = make(model, weight_decay=2e-3)
    if before:
        pyfeedback.convert(model, rule, optimizer=optimizer)
    else:
        pyfeedback.optim.follow(optimizer, model)
    train(model, optimizer, 12)
    assert caplog.messages == []


@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_and_layers_without_a_name(make, caplog):
    layer = make(4, 4, 1)
    optimizer = sgd(layer)
    pyfeedback.convert(layer, "ia")
    train(nn.Sequential(nn.Unflatten(1, (4, 1, 1)), layer), optimizer)
    (message,) = caplog.messages
    assert message.startswith(f"{make.__name__}(4, 4, kernel_size=(1, 1), stride=(1, 1), rule=ia")
    assert message.endswith(guard.NO_OPTIMIZER)


def test_attention(caplog):
    attention = nn.MultiheadAttention(4, 2)
    optimizer = sgd(attention)
    pyfeedback.convert(attention, "ia")
    x = torch.randn(3, 2, 4)
    for _ in range(3):
        optimizer.zero_grad()
        attention(x, x, x)[0].sum().backward()
        optimizer.step()
    (message,) = caplog.messages
    assert message.endswith(f", out_proj: {guard.NO_OPTIMIZER}")


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("rule", LEARNING)
def test_a_rule_that_is_stepped_after_the_weight_it_reads(rule, set_to_none, caplog):
    model = pyfeedback.convert(perceptron(4, 8, 4), rule)
    rest = torch.optim.SGD(pyfeedback.forward_parameters(model), lr=0.01, weight_decay=2e-3)
    feedback = pyfeedback.optim.FeedbackSGD(model, lr=0.01)
    for _ in range(5):
        model(torch.randn(4, 4)).square().sum().backward()
        rest.step()
        feedback.step()
        for optimizer in (rest, feedback):
            optimizer.zero_grad(set_to_none)
    assert caplog.messages == ([f"0, 2: {guard.LATE}"] if rule == "sa" else [])


def test_gradients_cleared_before_the_step(caplog):
    model = pyfeedback.convert(perceptron(4, 8, 4), "ia")
    rest = torch.optim.SGD(pyfeedback.forward_parameters(model), lr=0.01)
    feedback = pyfeedback.optim.FeedbackSGD(model, lr=0.01)
    for _ in range(4):
        model(torch.randn(4, 4)).square().sum().backward()
        rest.step()
        model.zero_grad()
        feedback.step()
    assert caplog.messages == [f"0, 2: {guard.NO_GRADIENT}"]


@pytest.mark.parametrize("rule", ["ia", "wm", "oja"])
@pytest.mark.parametrize("samples", [0, 1])
def test_a_centered_rule_with_one_sample(rule, samples, caplog):
    model = pyfeedback.convert(perceptron(4, 8, 4), pyfeedback.rule(rule, samples=samples))
    optimizer = pyfeedback.optim.SGD(model, lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(3 if samples else 1, 4)).square().sum().backward()
        optimizer.step()
    assert caplog.messages == [f"0, 2: {guard.SINGLE}"]


@pytest.mark.parametrize(("rule", "why"), [("ia-probes", "reads probes"), ("kp", "makes W and B decay")])
def test_a_rule_that_needs_our_optimizer(rule, why, caplog):
    model = pyfeedback.convert(perceptron(4, 8, 4), pyfeedback.rule(rule, tau=20.0))
    train(model, sgd(model))
    assert caplog.messages == [f"0, 2: {guard.NEEDED.format(why=why)}"]


@pytest.mark.parametrize("rule", ["ia", "sa"])
def test_the_weight_decay_of_another_optimizer(rule, caplog):
    model = pyfeedback.convert(perceptron(4, 8, 4), rule)
    train(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    assert caplog.messages == [f"0, 2: {guard.DECAYED.format(decay=0.1, optimizer='AdamW')}"]


@pytest.mark.parametrize("make", [sgd, lambda model, **options: pyfeedback.optim.SGD(model, lr=0.01, **options)])
def test_kolen_pollack_with_unequal_decay(make, caplog):
    model = pyfeedback.convert(perceptron(4, 8, 4), "kp")
    train(model, make(model, weight_decay=1e-4))
    assert caplog.messages == [f"0, 2: {guard.UNEQUAL.format(weight_decay=1e-4, decay=2e-3)}"]


@pytest.mark.parametrize("rule", LEARNING)
def test_a_scaler_with_torch_optim(rule, caplog):
    model = pyfeedback.convert(perceptron(4, 8, 4), rule)
    train(model, sgd(model, weight_decay=2e-3), scaler=torch.amp.GradScaler("cpu"))
    assert caplog.messages == [f"0, 2: {guard.SCALED}"]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_infinities_and_nans(value, caplog):
    model = pyfeedback.convert(perceptron(4, 8, 4), "sa")
    optimizer = pyfeedback.optim.SGD(model, lr=0.01)
    train(model, optimizer, 9)
    with torch.no_grad():
        model[2].feedback[0, 1] = value
    train(model, optimizer, 1)
    assert caplog.messages == [f"2: {guard.NOT_FINITE.format(count=10, optimizer='SGD')}"]
    train(model, optimizer, 90)
    assert guard.NOT_FINITE.format(count=100, optimizer="SGD") in caplog.messages[1]


def test_a_diverging_weight_under_a_rule_without_units(caplog):
    """B follows W there, so the rule has nothing to reduce."""
    model = pyfeedback.convert(perceptron(4, 8, 4), {"0": pyfeedback.rule("sa", tau=5), "2": "fa"})
    optimizer = pyfeedback.optim.SGD(model, lr=0.01)
    train(model, optimizer, 9)
    with torch.no_grad():
        model[0].weight[0, 1] = float("inf")
    train(model, optimizer, 1)
    assert caplog.messages == [f"0: {guard.NOT_FINITE_WITHOUT_UNITS.format(count=10, optimizer='SGD')}"]
    assert "reduce the learning rate of W" in caplog.messages[0]


def test_the_first_five_of_many_layers_are_named(caplog):
    model = perceptron(*[4] * 8)
    optimizer = sgd(model)
    train(pyfeedback.convert(model, "ia"), optimizer)
    assert caplog.messages == [f"0, 2, 4, 6, 8 and 2 more: {guard.NO_OPTIMIZER}"]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_examined(twin, caplog):
    model = twin(pyfeedback.convert(perceptron(4, 8, 4), "ia"))
    train(model, torch.optim.SGD(pyfeedback.forward_parameters(model), lr=0.01))
    assert caplog.messages == [f"0, 2: {guard.NO_OPTIMIZER}"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_model_is_examined_and_a_compiled_step_is_not_traced_again(caplog):
    torch._dynamo.reset()
    model = perceptron(4, 8, 4)
    optimizer = sgd(model)
    pyfeedback.convert(model, "ia")
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, optimizer)
    found = [record.getMessage() for record in caplog.records if record.name == "pyfeedback"]
    assert found == [f"0, 2: {guard.NO_OPTIMIZER}"]
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=counter)
    for _ in range(5):
        compiled(torch.randn(4, 4)).square().sum().backward()
        step()
        optimizer.zero_grad()
    assert counter.frame_count == 1


# The switch


def test_the_guard_can_be_turned_off(caplog):
    pyfeedback.set_guard(False)
    model = perceptron(4, 8, 4)
    optimizer = sgd(model)
    train(pyfeedback.convert(model, "ia"), optimizer)
    assert caplog.messages == []


@pytest.mark.parametrize("value", [1, "off", None])
def test_the_switch_is_a_flag(value):
    with pytest.raises(TypeError, match=r"enabled is .*, expected True or False"):
        pyfeedback.set_guard(value)


def test_the_environment_turns_it_off(monkeypatch):
    code = "import pyfeedback.guard as g; print(g._enabled)"
    for value, expected in (("off", "False"), ("on", "True")):
        monkeypatch.setenv("PYFEEDBACK_GUARD", value)
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.strip() == expected


# Hooks on the feedback weight


@pytest.mark.parametrize("make", [pyfeedback.optim.SGD, pyfeedback.optim.AdamW, pyfeedback.optim.FeedbackSGD])
@pytest.mark.parametrize("rule", LEARNING)
def test_hooks_fire_under_every_rule(rule, make):
    torch.manual_seed(0)
    layer = pyfeedback.convert(nn.Linear(4, 4), rule)
    layer.feedback.register_hook(torch.zeros_like)
    optimizer = make(layer, lr=0.01)
    before = layer.feedback.detach().clone()
    layer(torch.randn(3, 4)).square().sum().backward()
    assert not layer.feedback.grad.any()
    optimizer.step()
    if make is pyfeedback.optim.AdamW and rule == "kp":  # its decay is decoupled: not part of the gradient
        assert not torch.equal(layer.feedback, before)
    else:
        assert torch.equal(layer.feedback, before)
