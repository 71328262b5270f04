"""SGD and AdamW of a whole model: torch.optim's steps for the forward weights, the rule's for the feedback."""

import copy

import pytest
import torch
from cases import largest_error
from small_networks import RULES, classification, normalized_convnet, perceptron
from torch import nn

import pyfeedback
from pyfeedback.optim import SGD, AdamW, FeedbackSGD

OPTIONS = {
    SGD: [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}],
    AdamW: [{}, {"weight_decay": 0.1, "betas": (0.8, 0.9)}, {"amsgrad": True}],
}
BOTH = [(make, options) for make, each in OPTIONS.items() for options in each]


def network(rule, dtype=torch.float64):
    return pyfeedback.convert(normalized_convnet(), RULES[rule]).to(dtype)


def loss(model, seed, scale=1.0):
    x, target = classification(seed, 6, 3)
    return nn.functional.cross_entropy(model(x.to(model[0].weight.dtype)), target) * scale


def train(model, optimizer, steps=4, scaler=None):
    for seed in range(steps):
        optimizer.zero_grad()
        model.zero_grad()
        value = loss(model, seed)
        (scaler.scale(value) if scaler else value).backward()
        scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def error(found, expected):
    return largest_error([found[name] for name in expected], list(expected.values()))


@pytest.mark.parametrize(("make", "options"), BOTH)
@pytest.mark.parametrize("rule", RULES)
def test_forward_parameters_step_as_under_torch_optim(rule, make, options):
    """B is copied in each step, so that both have the same gradients."""
    found, expected = network(rule), network(rule)
    ours = make(found, lr=0.05, **options)
    theirs = getattr(torch.optim, make.__name__)(pyfeedback.forward_parameters(expected), lr=0.05, **options)
    for seed in range(4):
        for model, optimizer in ((found, ours), (expected, theirs)):
            model.zero_grad()
            loss(model, seed).backward()
            optimizer.step()
        for a, b in zip(pyfeedback.feedback_parameters(expected), pyfeedback.feedback_parameters(found), strict=True):
            a.data.copy_(b)
    for a, b in zip(pyfeedback.forward_parameters(found), pyfeedback.forward_parameters(expected), strict=True):
        assert largest_error([a.detach()], [b.detach()]) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_sgd_steps_the_feedback_as_feedback_sgd_before_the_task(rule):
    found = network(rule)
    expected = copy.deepcopy(found)
    train(found, SGD(found, lr=0.05, momentum=0.9, weight_decay=0.02))
    task = torch.optim.SGD(pyfeedback.forward_parameters(expected), lr=0.05, momentum=0.9, weight_decay=0.02)
    feedback = FeedbackSGD(expected, lr=0.05, momentum=0.9)
    for seed in range(4):
        expected.zero_grad()
        loss(expected, seed).backward()
        feedback.step(), task.step()
    assert error(dict(found.named_parameters()), dict(expected.named_parameters())) < 1e-12


@pytest.mark.parametrize("rule", ["wm", "ia", "sa", "aa"])
def test_adamw_follows_the_rules_gradient(rule):
    """Compared with torch's AdamW of B on the gradient from autograd."""
    found, expected = network(rule), network(rule)
    ours = AdamW(found, lr=0.05, weight_decay=0.1)
    theirs = [
        torch.optim.AdamW(pyfeedback.forward_parameters(expected), lr=0.05, weight_decay=0.1),
        torch.optim.AdamW(pyfeedback.feedback_parameters(expected), lr=0.05, weight_decay=0.0),
    ]
    for seed in range(4):
        for model, optimizers in ((found, [ours]), (expected, theirs)):
            model.zero_grad()
            loss(model, seed).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert error(dict(found.named_parameters()), dict(expected.named_parameters())) < 1e-12


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_kolen_pollack_contracts_the_difference(make):
    """Every step multiplies W - B by 1 - lr * decay, for any gradients."""
    model = network("kp")
    lr = 0.05
    optimizer = make(model, lr=lr, weight_decay=RULES["kp"].decay)
    before = [(layer.weight - layer.feedback).detach().clone() for _, layer in pyfeedback.feedback_layers(model)]
    train(model, optimizer, steps=6)
    shrunk = (1 - lr * RULES["kp"].decay) ** 6
    for (_, layer), difference in zip(pyfeedback.feedback_layers(model), before, strict=True):
        assert largest_error([(layer.weight - layer.feedback).detach()], [shrunk * difference]) < 1e-10


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_kolen_pollack_reads_the_clipped_gradient(make):
    model = network("kp")
    lr, (_, layer) = 0.05, next(pyfeedback.feedback_layers(model))
    optimizer = make(model, lr=lr, weight_decay=RULES["kp"].decay)
    before = (layer.weight - layer.feedback).detach()
    loss(model, 0, 1000.0).backward()
    assert nn.utils.clip_grad_norm_(pyfeedback.forward_parameters(model), 0.1) > 100
    optimizer.step()
    found = (layer.weight - layer.feedback).detach()
    assert largest_error([found], [(1 - lr * RULES["kp"].decay) * before]) < 1e-12


@pytest.mark.parametrize(("make", "options"), [(SGD, {"momentum": 0.9}), (AdamW, {})])
@pytest.mark.parametrize("rule", RULES)
def test_training_resumes_from_a_saved_state(rule, make, options, tmp_path):
    model = network(rule)
    optimizer = make(model, lr=0.05, **options)
    train(model, optimizer)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
    again = network(rule)
    fresh = make(again, lr=0.01, **options)
    for each, state in zip((again, fresh), torch.load(tmp_path / "saved.pt", weights_only=True), strict=True):
        each.load_state_dict(state)
    assert error(train(again, fresh), train(model, optimizer)) == 0


@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_scaler_changes_nothing(rule, make):
    plain, scaled = network(rule, torch.float32), network(rule, torch.float32)
    expected = train(plain, make(plain, lr=0.05))
    found = train(scaled, make(scaled, lr=0.05), scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_an_overflowing_step_changes_nothing(make):
    model = network("ia", torch.float32)
    optimizer = make(model, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(loss(model, 0, float("inf"))).backward()
    scaler.step(optimizer)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_unscaling_by_hand_raises(make):
    model = network("ia", torch.float32)
    optimizer = make(model, lr=0.05)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss(model, 0)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"scaler\.unscale_ divided the rules' own gradients"):
        scaler.step(optimizer)


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_a_scheduler_updates_every_group(make):
    model = network("kp")
    optimizer = make(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, 1)
    scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}


@pytest.mark.parametrize(("make", "options"), BOTH)
@pytest.mark.parametrize("rule", RULES)
def test_every_backend_takes_the_same_steps(rule, make, options):
    found, expected = network(rule), network(rule)
    train(found, make(found, lr=0.05, **options))
    with pyfeedback.backend("composite"):
        train(expected, make(expected, lr=0.05, **options))
    assert error(dict(found.named_parameters()), dict(expected.named_parameters())) < 1e-12


@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.parametrize("rule", ["sa", "kp"])
def test_a_rule_reads_the_weight_before_its_update(rule, make):
    """In the same call as W or, if their options differ, in an earlier call."""
    models = [network(rule) for _ in range(3)]
    for model, factor in zip(models, (1.0, 1.0 + 1e-14, 0.0), strict=True):
        optimizer = make(model, lr=0.05)
        for group in optimizer.param_groups:
            if group["params"][0] in set(pyfeedback.forward_parameters(model)):
                group["lr"] *= factor
        train(model, optimizer, steps=1)
    together, apart, held = ([p.detach() for p in pyfeedback.feedback_parameters(model)] for model in models)
    assert largest_error(together, apart) < 1e-12
    assert largest_error(together, held) < 1e-12


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_layers_that_share_a_weight_have_separate_feedback(make):
    def tied():
        model = pyfeedback.convert(perceptron(4, 4, 4), RULES["sa"]).double()
        model[2].weight = model[0].weight
        return model

    found, expected = tied(), tied()
    ours = make(found, lr=0.05, weight_decay=0.02)
    options = {"weight_decay": 0.0} if make is AdamW else {}
    feedback = getattr(torch.optim, make.__name__)(pyfeedback.feedback_parameters(expected), lr=0.05, **options)
    task = getattr(torch.optim, make.__name__)(pyfeedback.forward_parameters(expected), lr=0.05, weight_decay=0.02)
    for step in range(3):
        for model, optimizers in ((found, [ours]), (expected, [feedback, task])):
            model.zero_grad()
            torch.manual_seed(step)
            model(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert error(dict(found.named_parameters()), dict(expected.named_parameters())) < 1e-12


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_a_computed_weight_is_read_before_its_parameters_are_updated(make):
    def parametrized():
        model = network("sa")
        nn.utils.parametrizations.weight_norm(model[4])
        return model

    found, expected = parametrized(), parametrized()
    train(found, make(found, lr=0.05), steps=1)
    for group in (frozen := make(expected, lr=0.05)).param_groups:
        group["lr"] *= group["params"][0] in set(pyfeedback.feedback_parameters(expected))
    train(expected, frozen, steps=1)
    pairs = zip(*map(pyfeedback.feedback_parameters, (found, expected)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("nonfinite", ["weight", "bias"])
def test_a_nonfinite_gradient_skips_the_whole_step(nonfinite):
    model = network("kp")
    optimizer = SGD(model, lr=0.05, skip_nonfinite=True)
    before = copy.deepcopy(model.state_dict())
    loss(model, 0).backward()
    getattr(model[5], nonfinite).grad.view(-1)[0] = float("nan")
    optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_forward_parameters_in_groups(make):
    """No weight decay for biases and norms, as is common, and the first layer is not trained."""

    def groups(model):
        forward = list(pyfeedback.forward_parameters(model))[1:]
        return [
            {"params": [p for p in forward if p.dim() > 1]},
            {"params": (p for p in forward if p.dim() <= 1), "weight_decay": 0.0, "lr": 0.1},
        ]

    found, expected = network("fa"), network("fa")
    train(found, make(found, lr=0.05, weight_decay=0.02, params=groups(found)))
    train(expected, getattr(torch.optim, make.__name__)(groups(expected), lr=0.05, weight_decay=0.02))
    assert error(dict(found.named_parameters()), dict(expected.named_parameters())) < 1e-12


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_a_group_added_later(make):
    found, expected = network("fa"), network("fa")
    for model, kind in ((found, make), (expected, getattr(torch.optim, make.__name__))):
        first, *others = pyfeedback.forward_parameters(model)
        options = {"params": others} if kind is make else {}
        optimizer = kind(model if kind is make else others, lr=0.05, weight_decay=0.02, **options)
        train(model, optimizer, 1)
        optimizer.add_param_group({"params": first, "lr": 0.1})
        train(model, optimizer, 2)
    assert error(dict(found.named_parameters()), dict(expected.named_parameters())) < 1e-12


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_a_model_without_feedback_layers_is_refused(make):
    with pytest.raises(ValueError, match="model has no layer with a feedback weight"):
        make(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="weight_decay"):
        make(network("ia"), weight_decay=-1.0)


@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.parametrize("given", ["forward parameters", "all parameters", "added later"])
def test_feedback_weights_have_the_options_of_the_group_of_their_weight(given, make):
    """Under Kolen-Pollack, W - B contracts only if both have the same learning rate."""
    model = pyfeedback.convert(normalized_convnet(), pyfeedback.rule("kp", decay=0.1)).double()
    layers = [layer for _, layer in pyfeedback.feedback_layers(model)]
    before = [(layer.weight - layer.feedback).detach() for layer in layers]
    first = list(layers[0].parameters())
    others = [p for p in model.parameters() if all(p is not q for q in first)]
    if given == "forward parameters":
        first = [layers[0].weight]
        others = [p for p in pyfeedback.forward_parameters(model) if p is not first[0]]
    groups = [{"params": (p for p in first), "lr": 0.02}, {"params": others}]
    optimizer = make(model, lr=0.1, weight_decay=0.1, params=groups[1:] if given == "added later" else groups)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)  # sets initial_lr
    if given == "added later":
        optimizer.add_param_group(groups[0])
    assert all(group.get("initial_lr", group["lr"]) == group["lr"] for group in optimizer.param_groups)
    train(model, optimizer, steps=5)
    for layer, difference, lr in zip(layers, before, [0.02] + [0.1] * len(layers), strict=False):
        contracted = difference * (1 - lr * 0.1) ** 5
        assert (layer.weight - layer.feedback - contracted).abs().max() < 1e-12
    assert all(group["params"] for group in optimizer.param_groups)


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_wrong_flags_and_parameters_are_refused(make):
    model = network("ia")
    for options, what in (
        ({"params": 3}, "params is or contains 3, expected parameters, or groups of them"),
        ({"params": model.named_parameters()}, "params is or contains a tuple, expected parameters"),
        ({"nesterov" if make is SGD else "amsgrad": "no"}, "is 'no', expected True or False"),
    ):
        with pytest.raises(TypeError, match=what):
            make(model, lr=0.1, **options)
    with pytest.raises(TypeError, match="skip_nonfinite is 'no', expected True or False"):
        pyfeedback.optim.follow(torch.optim.SGD(model.parameters(), lr=0.1), model, skip_nonfinite="no")
