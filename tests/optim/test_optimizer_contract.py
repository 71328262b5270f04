"""The optimizers with loss scaling, computed weights, and complex and sparse parameters."""

import logging
from functools import partial

import pytest
import torch
from small_networks import COMPUTED, perceptron
from torch import nn
from torch.nn.utils import parametrizations

import pyfeedback
from pyfeedback import Rule
from pyfeedback.optim import SGD, AdamW, FeedbackSGD

OPTIMIZERS = {"FeedbackSGD": FeedbackSGD, "SGD": SGD, "AdamW": AdamW}
RULES = {
    "wm": Rule(amp=0.1, decay=0.05, center=True, name="wm"),
    "ia": Rule(amp=0.1, null=0.1, decay=0.05, center=True, name="ia"),
    "oja": Rule(amp=0.1, null=0.1, center=True, name="oja"),
    "aa": Rule(amp=0.1, sparse=0.1, name="aa"),
    "sa": Rule(self_=0.3, decay=0.3, name="sa"),
    "kp": Rule(tie=1.0, decay=0.1, name="kp"),
    "pfa": Rule(tie=1.0, decay=0.1, expansion=2, name="pfa"),
    "data and tie": Rule(amp=0.1, null=0.1, tie=0.5, decay=0.05, name="data and tie"),
}


def network(rule):
    return pyfeedback.convert(perceptron(6, 8, 3), rule)


def train(model, step, scaler=None, steps=4):
    """Train with ``step(scaler)`` after the backward pass of the scaled loss."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model.zero_grad()
        x, target = torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)
        loss = (model(x) - target).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        step(scaler)
        if scaler is not None:
            scaler.update()
    return [p.detach().clone() for p in model.parameters()]


def take(scaler, *optimizers):
    for optimizer in optimizers:
        optimizer.step() if scaler is None else scaler.step(optimizer)


def scaler(scale=4096.0):
    return torch.amp.GradScaler("cpu", init_scale=scale)


def two_optimizers(rule, scaling):
    model = network(rule)
    learner = FeedbackSGD(model, lr=0.1, momentum=0.9)
    task = torch.optim.SGD(pyfeedback.forward_parameters(model), lr=0.1, momentum=0.9)
    return train(model, lambda s: take(s, learner, task), scaling)


@pytest.mark.parametrize("rule", ["wm", "ia", "oja", "aa", "sa"])
def test_two_optimizers_under_a_scaler_train_as_without_one(rule):
    torch.testing.assert_close(two_optimizers(RULES[rule], scaler()), two_optimizers(RULES[rule], None))


@pytest.mark.parametrize("rule", ["kp", "pfa", "data and tie"])
def test_a_rule_that_reads_a_scaled_gradient_of_another_optimizer_is_refused(rule):
    with pytest.raises(RuntimeError, match=r"0 follows .*, which reads weight.grad.* expected pyfeedback.optim.SGD or"):
        two_optimizers(RULES[rule], scaler())


@pytest.mark.parametrize(
    "optimizer", [partial(SGD, lr=0.1, momentum=0.9), partial(AdamW, lr=0.01)], ids=["SGD", "AdamW"]
)
@pytest.mark.parametrize("rule", RULES)
def test_one_optimizer_under_a_scaler_is_that_without(rule, optimizer):
    # The sum of a scaled tie and unscaled data terms has the rounding error of the former.
    scale = 16.0 if rule == "data and tie" else 4096.0
    results = []
    for scaling in (scaler(scale), None):
        model = network(RULES[rule])
        own = optimizer(model)
        results.append(train(model, lambda s, own=own: take(s, own), scaling))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_an_overflow_of_the_loss_changes_nothing():
    model = network(RULES["kp"])
    own, scaling = SGD(model, lr=0.1), scaler()
    before = [p.detach().clone() for p in model.parameters()]
    scaling.scale((model(torch.randn(4, 6)) * torch.inf).sum()).backward()
    scaling.step(own)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("rule", ["sa", "kp", "ia"])
def test_stepping_the_rule_before_the_task_equals_one_optimizer(rule):
    model = network(RULES[rule])
    own = SGD(model, lr=0.1, momentum=0.9)
    torch.testing.assert_close(two_optimizers(RULES[rule], None), train(model, lambda s: take(s, own)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["sa", "kp"])
@pytest.mark.parametrize("computed", COMPUTED)
def test_feedback_of_a_computed_weight_follows_its_rule(computed, rule, optimizer):
    model, rule = network(RULES[rule]), RULES[rule]
    layer = model[2]
    COMPUTED[computed](layer)
    own = OPTIMIZERS[optimizer](model, lr=0.1)
    made = {}
    model[1].register_forward_hook(lambda module, args, output: made.update(x=output))
    layer.register_forward_hook(lambda module, args, output: made.update(y=output, w=layer.weight.detach().clone()))
    output = model(torch.randn(16, 6))
    made["y"].retain_grad()
    output.square().mean().backward()
    before = layer.feedback.detach().clone()
    own.step()
    grad_weight = made["y"].grad.t() @ made["x"].detach()
    grad = rule.tie * grad_weight - rule.self_ * made["w"]
    if optimizer == "AdamW":
        decay = rule.decay if rule.tie else 0.0
        grad = grad + (rule.decay - decay) * before
        expected = before * (1 - 0.1 * decay) - 0.1 * grad / (grad.abs() + 1e-8)
    else:
        expected = before - 0.1 * (grad + rule.decay * before)
    torch.testing.assert_close(layer.feedback.detach(), expected)
    assert not torch.equal(layer.feedback, before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_weight_computed_after_the_optimizer_was_built_is_refused(optimizer):
    model = network(RULES["kp"])
    own = OPTIMIZERS[optimizer](model, lr=0.1)
    parametrizations.weight_norm(model[2])
    model(torch.randn(4, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=r"2\.weight is computed from other parameters, but was a parameter when"):
        own.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["kp", "sa", "ia"])
def test_a_layer_without_a_product_keeps_its_feedback(rule, optimizer, caplog):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return (self.called(x).unsqueeze(1) * self.read.weight).sum(-1) + self.read.bias

    model = pyfeedback.convert(Reads(), RULES[rule])
    own = OPTIMIZERS[optimizer](model, lr=0.1)
    before = model.read.feedback.detach().clone()
    with caplog.at_level(logging.WARNING, "pyfeedback"):
        for _ in range(2):
            own.zero_grad()
            model(torch.randn(4, 6)).square().sum().backward()
            own.step()
    assert torch.equal(model.read.feedback, before)
    (warning,) = [record.getMessage() for record in caplog.records if "neither called" in record.getMessage()]
    assert warning.startswith("read:")


class Mixed(nn.Module):
    """A sparse embedding, a complex parameter, and a layer that is converted."""

    def __init__(self, sparse=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 6, sparse=sparse)
        self.phase = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        return self.head((self.embedding(tokens) * self.phase).abs())


@pytest.mark.parametrize("backend", ["auto", "composite"])
@pytest.mark.parametrize(
    ("sparse", "ours", "theirs"),
    [
        (True, partial(SGD, lr=0.1), partial(torch.optim.SGD, lr=0.1)),
        (True, partial(SGD, lr=0.1, momentum=0.9), partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
        (
            False,
            partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
            partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        ),
        (False, partial(AdamW, lr=0.1), partial(torch.optim.AdamW, lr=0.1)),
        (False, partial(AdamW, lr=0.1, amsgrad=True), partial(torch.optim.AdamW, lr=0.1, amsgrad=True)),
    ],
    ids=["sgd", "sgd momentum", "sgd nesterov", "adamw", "amsgrad"],
)
def test_complex_parameters_and_sparse_gradients_step_as_torchs(sparse, ours, theirs, backend):
    results = []
    for optimizer, rule in ((ours, "fa"), (theirs, None)):
        model = Mixed(sparse)
        if rule:
            pyfeedback.convert(model, rule)
            model.head.feedback.data.copy_(model.head.weight)  # same gradients in the first step
        own = optimizer(model if rule else model.parameters())
        with pyfeedback.backend(backend):
            for tokens in torch.arange(8).split(4):
                own.zero_grad()
                model(tokens).square().sum().backward()
                own.step()
                if rule:
                    model.head.feedback.data.copy_(model.head.weight)
        results.append({name: p.detach() for name, p in model.named_parameters() if "feedback" not in name})
        own.load_state_dict(own.state_dict())
    torch.testing.assert_close(*results)


def test_adamw_refuses_a_sparse_gradient_as_torchs_does():
    model = pyfeedback.convert(Mixed(), "fa")
    own = AdamW(model)
    model(torch.arange(4)).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"a parameter of shape \(20, 6\) has a sparse gradient, expected a dense one; SGD"
    ):
        own.step()


BAD = {
    "FeedbackSGD model": (lambda m: FeedbackSGD(m.parameters(), 0.1), "model is a generator, expected the converted"),
    "SGD model": (lambda m: SGD(m.parameters(), 0.1), "model is a generator, expected the converted model itself"),
    "AdamW model": (lambda m: AdamW(list(m.parameters())), "model is a list, expected the converted model itself"),
    "plain model": (lambda m: SGD(nn.Linear(2, 2)), "model has no layer with a feedback weight, expected a model"),
    "SGD lr nan": (lambda m: SGD(m, float("nan")), "lr is nan, expected a finite number, 0 or more"),
    "SGD lr text": (lambda m: SGD(m, "0.1"), "lr is '0.1', expected a finite number, 0 or more"),
    "SGD momentum": (lambda m: SGD(m, 0.1, -1.0), "momentum is -1.0, expected a finite number, 0 or more"),
    "SGD weight_decay": (lambda m: SGD(m, 0.1, 0.9, -0.1), "weight_decay is -0.1, expected a finite number, 0 or"),
    "SGD nesterov": (lambda m: SGD(m, 0.1, nesterov=True), "nesterov is True with momentum 0, expected a momentum"),
    "noise": (lambda m: FeedbackSGD(m, 0.1, noise=float("inf")), "noise is inf, expected a finite number, 0 or more"),
    "AdamW lr nan": (lambda m: AdamW(m, float("nan")), "lr is nan, expected a finite number, 0 or more"),
    "AdamW lr negative": (lambda m: AdamW(m, -1.0), "lr is -1.0, expected a finite number, 0 or more"),
    "AdamW lr bool": (lambda m: AdamW(m, True), "lr is True, expected a finite number, 0 or more"),
    "AdamW betas": (lambda m: AdamW(m, betas=(0.9, 1.0)), "betas[1] is 1.0, expected a number in [0, 1)"),
    "AdamW betas count": (lambda m: AdamW(m, betas=(0.9,)), "betas is (0.9,), expected two numbers in [0, 1)"),
    "AdamW betas nan": (lambda m: AdamW(m, betas=(float("nan"), 0.9)), "betas[0] is nan, expected a number in"),
    "AdamW eps": (lambda m: AdamW(m, eps=-1e-8), "eps is -1e-08, expected a finite number, 0 or more"),
    "AdamW weight_decay": (lambda m: AdamW(m, weight_decay=None), "weight_decay is None, expected a finite number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, message = BAD[case]
    with pytest.raises((TypeError, ValueError)) as refused:
        call(network("fa"))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
