"""Feedback weights that follow any optimizer of PyTorch take the steps of their rules, and W those of the optimizer."""

import copy
import logging
from functools import partial

import pytest
import torch
from cases import largest_error
from small_networks import COMPUTED, RULES, classification, normalized_convnet, perceptron
from torch import nn

import pyfeedback
from pyfeedback import rule as rule_of
from pyfeedback.optim import AdamW, FeedbackSGD, follow

ALL = {
    **RULES,
    "oja": rule_of("oja", amp=0.02, null=0.02),
    "pfa": rule_of("pfa", decay=0.1),
    "mixed": pyfeedback.Rule(self_=0.2, decay=0.1, tie=0.5, name="mixed"),
    "dfa": rule_of("dfa"),
    **{name: rule_of(name) for name in ("wm-probes", "ia-probes", "aa-probes")},
    **{f"{name} with tau": rule_of(name, tau=20) for name in ("wm", "ia", "sa", "aa")},
}
TIED = ("kp", "pfa")


class Lion(torch.optim.Optimizer):
    """An optimizer of a user: signs of a moving average, decoupled decay, and no momentum option."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(average.sign(), alpha=group["lr"])


OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "SGD momentum": partial(torch.optim.SGD, momentum=0.9, foreach=True),
    "SGD fused": partial(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True),
    "Adam": torch.optim.Adam,
    "AdamW": partial(torch.optim.AdamW, foreach=True),
    "AdamW fused": partial(torch.optim.AdamW, fused=True),
    "RMSprop": partial(torch.optim.RMSprop, momentum=0.5),
    "Adagrad": torch.optim.Adagrad,
    "Rprop": torch.optim.Rprop,
    "Lion": Lion,
}


def network(rule, dtype=torch.float64):
    return pyfeedback.convert(normalized_convnet(), ALL.get(rule, rule)).to(dtype)


def backward(model, seed):
    model.zero_grad()
    x, target = classification(seed, 6, 3)
    loss = nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), target)
    loss.backward()
    return loss


def train(model, *optimizers, steps=6):
    for seed in range(steps):
        backward(model, seed)
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def error(found, expected):
    assert found.keys() == expected.keys()
    return largest_error(list(found.values()), list(expected.values()))


def differences(model):
    layers = [layer.eval() for _, layer in pyfeedback.feedback_layers(model)]
    found = [(layer.weight - layer.feedback).detach().clone() for layer in layers]
    model.train()
    return found


def pairs(*models):
    return zip(*(pyfeedback.feedback_parameters(model) for model in models), strict=True)


# The steps of the rules


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True}], ids=["plain", "nesterov"])
@pytest.mark.parametrize("rule", ALL)
def test_sgd_that_is_followed_trains_as_sgd_of_the_package(rule, options):
    """Over 100 steps; the optimizer has the feedback weights as well, or not."""
    model, twin = network(rule), network(rule)
    parameters = model.parameters() if options else pyfeedback.forward_parameters(model)
    options = {"lr": 0.05, "weight_decay": ALL[rule].decay if rule in TIED else 0.02, **options}
    optimizer = torch.optim.SGD(parameters, **options)
    follow(optimizer, model)
    found = train(model, optimizer, steps=100)
    assert error(found, train(twin, pyfeedback.optim.SGD(twin, **options), steps=100)) < 1e-11


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["fa", "ia", "sa", "mixed", "ia-probes", "aa with tau"])
def test_any_optimizer_trains_as_with_feedback_sgd_stepped_first(rule, optimizer):
    model, twin = network(rule), network(rule)
    task = OPTIMIZERS[optimizer](model.parameters(), lr=0.01)
    follow(task, model)
    found = train(model, task)
    theirs = OPTIMIZERS[optimizer](pyfeedback.forward_parameters(twin), lr=0.01)
    assert error(found, train(twin, feedback_sgd(twin, theirs), theirs)) < 1e-12


def feedback_sgd(model, optimizer):
    """FeedbackSGD with the options of the optimizer."""
    options = optimizer.param_groups[0]
    momentum, nesterov = options.get("momentum", 0.0), options.get("nesterov", False)
    return FeedbackSGD(model, options["lr"], momentum, nesterov)


def test_muon_of_the_matrices_is_followed():
    model, twin = (pyfeedback.convert(perceptron(6, 8, 3), ALL["sa"]) for _ in range(2))
    task, theirs = (torch.optim.Muon([net[0].weight, net[2].weight], lr=0.01) for net in (model, twin))
    follow(task, model)
    for net, optimizers in ((model, [task]), (twin, [feedback_sgd(twin, theirs), theirs])):
        for step in range(3):
            net.zero_grad()
            net(torch.linspace(-1, 1, 30).view(5, 6) * (1 + step)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert error(dict(model.named_parameters()), dict(twin.named_parameters())) < 1e-6


def test_the_learning_rate_is_that_of_the_group_of_the_weight_and_follows_schedules():
    model, twin = network("sa"), network("sa")
    matrices = [model[0].weight, model[4].weight]
    others = [p for p in pyfeedback.forward_parameters(model) if not any(p is m for m in matrices)]
    optimizer = torch.optim.Adam([{"params": matrices, "lr": 0.2}, {"params": others}], lr=0.05)
    follow(optimizer, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(3):
        for (_, ours), (b,) in zip(pyfeedback.feedback_layers(model), pairs(twin), strict=True):
            lr = (0.2 if any(ours.weight is m for m in matrices) else 0.05) * 0.5**step
            b.data.copy_(ours.feedback - lr * (0.3 * ours.feedback - 0.2 * ours.weight))
        backward(model, step)
        optimizer.step()
        scheduler.step()
        assert all(largest_error([a.detach()], [b.detach()]) < 1e-12 for a, b in pairs(model, twin))


def test_given_options_replace_those_of_the_optimizer():
    model, twin = network("ia"), network("ia")
    task = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    follow(task, model, lr=0.1, momentum=0.5)
    expected = torch.optim.SGD(pyfeedback.forward_parameters(twin), lr=0.01, momentum=0.9)
    assert error(train(model, task), train(twin, FeedbackSGD(twin, lr=0.1, momentum=0.5), expected)) < 1e-12


@pytest.mark.parametrize("rule", ["fa", "kp", "ia"])
def test_noise_is_that_of_feedback_sgd(rule):
    model, twin = network(rule), network("fa" if rule == "kp" else rule)
    task = torch.optim.SGD(model.parameters(), lr=0.0)
    follow(task, model, lr=0.1, noise=0.5)
    expected = [torch.optim.SGD(pyfeedback.forward_parameters(twin), lr=0.0), FeedbackSGD(twin, lr=0.1, noise=0.5)]
    ends = []
    for net, optimizers in ((model, [task]), (twin, expected[::-1])):
        torch.manual_seed(3)
        before = [b.detach().clone() for (b,) in pairs(net)]
        train(net, *optimizers, steps=1)
        ends.append([(b - a).detach() for (b,), a in zip(pairs(net), before, strict=True)])
    for ours, theirs in zip(*ends, strict=True):
        assert (ours - theirs).norm() < (0.5 if rule == "kp" else 1e-9) * theirs.norm()


def test_adam_with_rules_without_units_trains_and_aligns():
    model = normalized_convnet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)  # built before the conversion
    pyfeedback.convert(model, "ia-probes", optimizer=optimizer)
    losses = [
        backward(model, seed % 4) and optimizer.step(closure=lambda s=seed: backward(model, s % 4))
        for seed in range(150)
    ]
    assert losses[-1] < 0.3 * losses[0]
    assert all(layer.angle < 30 for layer in pyfeedback.alignment(model).values())


# Kolen-Pollack


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "Rprop"])
@pytest.mark.parametrize("rule", ["kp", rule_of("kp", decay=0.3)], ids=str)
def test_kolen_pollack_contracts_the_difference_under_any_optimizer(rule, optimizer):
    model = network(rule)
    decay, lr, steps = model[0].rule.decay, 0.02, 6
    task = OPTIMIZERS[optimizer](model.parameters(), lr=lr, weight_decay=decay)
    follow(task, model)
    before, weights = (
        differences(model),
        [layer.weight.detach().clone() for _, layer in pyfeedback.feedback_layers(model)],
    )
    train(model, task, steps=steps)
    options, factor, speed = task.param_groups[0], 1.0, 0.0
    momentum = options.get("momentum", 0.0) if "SGD" in optimizer else 0.0
    for _ in range(steps):
        speed = momentum * speed + decay * factor
        factor -= lr * (decay * factor + momentum * speed if options.get("nesterov") else speed)
    for found, difference in zip(differences(model), before, strict=True):
        assert largest_error([found], [factor * difference]) < 1e-11
    assert all(
        (layer.weight - w).norm() > 0.01 * w.norm()
        for (_, layer), w in zip(pyfeedback.feedback_layers(model), weights, strict=True)
    )


def test_kolen_pollack_under_adamw_is_that_of_the_package():
    model, twin = network("kp"), network("kp")
    task = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    follow(task, model)
    assert error(train(model, task), train(twin, AdamW(twin, lr=0.02, weight_decay=0.1))) < 1e-11


def test_with_another_weight_decay_each_decays_by_its_own():
    model, twin = network("kp"), network("kp")
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.02}
    task = torch.optim.SGD(model.parameters(), **options)
    follow(task, model)
    assert error(train(model, task), train(twin, pyfeedback.optim.SGD(twin, **options))) < 1e-11


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_kolen_pollack_with_a_time_constant_decays_both(optimizer, caplog):
    """W - B shrinks by 1 - 1 / tau in each step, and by less under a schedule that reduces the learning rate."""
    model, twin = network(rule_of("kp", tau=20)), network(rule_of("kp", tau=20))
    options = {"lr": 0.02, "weight_decay": 0.0}
    task, theirs = (
        OPTIMIZERS[optimizer](model.parameters(), **options),
        getattr(pyfeedback.optim, optimizer)(twin, **options),
    )
    with caplog.at_level(logging.WARNING, "pyfeedback"):
        follow(task, model)
    assert not caplog.records
    before = differences(model)
    for net, each in ((model, task), (twin, theirs)):
        scheduler = torch.optim.lr_scheduler.StepLR(each, 2, 0.5)
        for seed in range(4):
            backward(net, seed)
            each.step()
            scheduler.step()
    assert error(dict(model.named_parameters()), dict(twin.named_parameters())) < 1e-11
    for found, difference in zip(differences(model), before, strict=True):
        assert largest_error([found], [0.95**2 * 0.975**2 * difference]) < 1e-11


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("optimizer", ["SGD momentum", "Adam", "AdamW"])
@pytest.mark.parametrize("computed", COMPUTED)
def test_kolen_pollack_follows_a_computed_weight(computed, optimizer):
    decay = 0.0 if computed == "orthogonal" else 0.1  # weight decay breaks this parametrization of torch
    model = pyfeedback.convert(perceptron(6, 8, 3), rule_of("kp", decay=decay)).double()
    COMPUTED[computed](model[2])
    task = OPTIMIZERS[optimizer](model.parameters(), lr=0.02, weight_decay=decay)
    follow(task, model, momentum=0.0)
    assert not model[2].feedback.requires_grad
    x = torch.randn(16, 6).double()
    start = [d.norm() for d in differences(model)]
    for _ in range(4):
        model(x).square().mean().backward()
        weight = model[2].weight.detach().clone()
        task.step()
        task.zero_grad()
        model(x)  # hooks compute the weight in the forward pass
    model.eval()(x)
    assert (model[2].weight - weight).norm() > 0
    if "spectral" not in computed:  # its power iteration changes W between the steps
        for found, difference in zip(differences(model), start, strict=True):
            torch.testing.assert_close(found.norm(), (1 - 0.02 * decay) ** 4 * difference)


@pytest.mark.parametrize("computed", ["weight_norm", "orthogonal", "prune"])
@pytest.mark.parametrize("rule", ["sa", "ia"])
def test_other_rules_follow_a_computed_weight(rule, computed):
    model, twin = (pyfeedback.convert(perceptron(6, 8, 3), ALL[rule]).double() for _ in range(2))
    for net in (model, twin):
        torch.manual_seed(1)
        COMPUTED[computed](net[2])
    task = torch.optim.Adam(model.parameters(), lr=0.02)
    follow(task, model)
    learner = FeedbackSGD(twin, lr=0.02)
    theirs = torch.optim.Adam(pyfeedback.forward_parameters(twin), lr=0.02)
    for net, optimizers in ((model, [task]), (twin, [learner, theirs])):
        generator = torch.Generator().manual_seed(2)
        for _ in range(4):
            net.zero_grad()
            net(torch.randn(16, 6, dtype=torch.float64, generator=generator)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert error(dict(model.named_parameters()), dict(twin.named_parameters())) < 1e-11


@pytest.mark.parametrize("rule", ["kp", "sa", "ia"])
def test_layers_that_share_a_weight_have_separate_feedback(rule):
    nets = [pyfeedback.convert(perceptron(4, 4, 4), ALL[rule]).double() for _ in range(2)]
    for net in nets:
        net[2].weight = net[0].weight
    task = torch.optim.SGD(nets[0].parameters(), lr=0.05, weight_decay=0.1)
    follow(task, nets[0])
    for net, optimizer in zip(nets, (task, pyfeedback.optim.SGD(nets[1], lr=0.05, weight_decay=0.1)), strict=True):
        for seed in range(3):
            net.zero_grad()
            torch.manual_seed(seed)
            net(torch.randn(5, 4).double()).square().sum().backward()
            optimizer.step()
    assert error(*(dict(net.named_parameters()) for net in nets)) < 1e-12


@pytest.mark.parametrize("rule", ["kp", "ia"])
def test_skip_nonfinite_keeps_the_feedback(rule):
    model = network(rule)
    task = torch.optim.SGD(model.parameters(), lr=0.1)
    follow(task, model, skip_nonfinite=True)
    before = [b.detach().clone() for (b,) in pairs(model)]
    x, _ = classification(0, 6, 3)
    (model(x.double() * (torch.nan if rule == "ia" else 1.0)) * torch.inf).sum().backward()
    task.step()
    assert not model[4].weight.isfinite().all()
    found = [b.detach() for (b,) in pairs(model)]
    assert all(b.isfinite().all() and (b - a).norm() < 0.02 * a.norm() for a, b in zip(before, found, strict=True))


def test_a_copy_of_the_model_is_independent():
    model = network("ia")
    task = torch.optim.SGD(model.parameters(), lr=0.1)
    follow(task, model)
    twin = copy.deepcopy(model)
    backward(twin, 0)
    assert all(b.grad is not None for (b,) in pairs(twin))
    before = [b.detach().clone() for (b,) in pairs(model)]
    task.step()
    assert all(torch.equal(b, a) for (b,), a in zip(pairs(model), before, strict=True))


def test_kolen_pollack_of_a_weight_that_the_forward_computes():
    """B follows the gradient of the computed weight, whose change is known only after the next forward pass."""

    class Standardized(nn.Linear):
        def forward(self, x):
            return x @ ((self.weight - self.weight.mean()) / self.weight.std()).t() + self.bias

    torch.manual_seed(0)
    model, twin = (
        pyfeedback.convert(Standardized(4, 4).double(), rule_of("kp"), init=pyfeedback.Init(seed=0)) for _ in "ab"
    )
    twin.load_state_dict(model.state_dict())
    task = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)
    follow(task, model)
    whole = pyfeedback.optim.SGD(twin, lr=0.05, weight_decay=0.1)
    before = model.weight_feedback.feedback.detach().clone()
    for _ in range(5):
        x = torch.randn(8, 4, dtype=torch.float64)
        for each, optimizer in ((model, task), (twin, whole)):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    assert not torch.allclose(model.weight_feedback.feedback, before)
    torch.testing.assert_close(model.weight_feedback.feedback, twin.weight_feedback.feedback)
