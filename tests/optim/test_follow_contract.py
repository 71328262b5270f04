"""Followed optimizers with GradScaler, clipping, accumulated passes, closures and bad arguments."""

import pytest
import torch
from followed import OPTIMIZERS, SEEN, are_equal, error, feedback, loss, network, parameters
from small_networks import RULES, perceptron
from torch import nn

import pyfeedback
from pyfeedback.optim import FeedbackSGD, follow

# The gradients of B


@pytest.mark.parametrize("rule", SEEN)
def test_nothing_sees_the_gradients_of_the_feedback(rule):
    model = network(rule)
    task = OPTIMIZERS["SGD"](model.parameters())
    follow(task, model)
    loss(model, 0).backward()
    assert all(b.grad is None for b in pyfeedback.feedback_parameters(model))
    expected = torch.cat([p.grad.flatten() for p in pyfeedback.forward_parameters(model)]).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1e-3), expected)


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale and clip"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["ia", "sa", "kp", "ia-probes"])
def test_a_gradient_scaler_changes_nothing_and_a_skipped_step_moves_nothing(rule, optimizer, unscale):
    """The scaled run has one more step, whose loss overflows."""
    ends = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**12), torch.amp.GradScaler("cpu", enabled=False)):
        model = network(rule)
        task = OPTIMIZERS[optimizer](model.parameters())
        follow(task, model)
        for seed in (0, 1, -1, 2, 3) if scaler.is_enabled() else (0, 1, 2, 3):
            task.zero_grad()
            value = loss(model, max(seed, 0) + (10 if seed < 0 else 0)) * (torch.inf if seed < 0 else 1.0)
            before = parameters(model)
            scaler.scale(value).backward()
            if unscale:
                scaler.unscale_(task)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(task)
            scaler.update()
            assert (error(parameters(model), before) == 0) == (seed < 0)
        ends.append(parameters(model))
    assert error(*ends) < 1e-5


@pytest.mark.parametrize("rule", SEEN)
def test_accumulated_passes_are_averaged(rule):
    """Two halves of a batch, under rules without statistics of the batch, train as the whole batch."""
    ends = []
    for parts in ([slice(None)], [slice(4), slice(4, 8)]):
        convnet = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
        torch.manual_seed(0)
        for p in convnet.parameters():
            nn.init.normal_(p, 0, 0.3)
        given = SEEN[rule] if not SEEN[rule].center else pyfeedback.rule(SEEN[rule], center=False)
        model = pyfeedback.convert(convnet.double(), given, init=pyfeedback.Init(seed=1))
        task = OPTIMIZERS["SGD"](model.parameters())
        follow(task, model)
        for seed in range(3):
            task.zero_grad()
            for part in parts:
                (loss(model, seed, part) / len(parts)).backward()
            task.step()
        ends.append(parameters(model))
    assert error(*ends) < 1e-11


def test_passes_without_a_step_are_dropped_when_the_gradients_are_cleared():
    ends = []
    for dropped in (0, 3):
        model = network("ia", torch.float64)
        task = torch.optim.SGD(pyfeedback.forward_parameters(model), lr=0.05)
        follow(task, model)
        for seed in range(dropped):
            loss(model, 5 + seed).backward()
        task.zero_grad()
        model[1].reset_running_stats()
        for seed in range(2):
            (loss(model, seed) / 2).backward()
        task.step()
        ends.append(parameters(model))
    assert error(*ends) == 0


def test_a_layer_used_twice_in_a_pass_has_one_gradient():
    model, twin = (pyfeedback.convert(perceptron(5, 5, 5), RULES["ia"]).double() for _ in range(2))
    task, theirs = (torch.optim.SGD(pyfeedback.forward_parameters(net), lr=0.1) for net in (model, twin))
    follow(task, model)
    learner = FeedbackSGD(twin, lr=0.1)
    x = torch.randn(4, 5).double()
    for net in (model, twin):
        net(net(x)).square().sum().backward()
    task.step()
    learner.step(), theirs.step()
    assert error(parameters(model), parameters(twin)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["ia", "sa", "kp"])
def test_a_compiled_model_trains_as_an_eager_one(rule):
    ends = []
    for compiled in (False, True):
        model = network(rule)
        task = OPTIMIZERS["Adam"](model.parameters())
        follow(task, model)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for seed in range(3):
            task.zero_grad()
            loss(run, seed).backward()
            task.step()
        ends.append(parameters(model))
    assert error(*ends) < 1e-5


# Closures


@pytest.mark.parametrize("rule", ["ia", "sa", "kp"])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_takes_the_same_steps(rule, by_name):
    ends = []
    for closes in (False, True):
        model = network(rule, torch.float64)
        task = OPTIMIZERS["SGD"](model.parameters())
        follow(task, model)
        for seed in range(3):

            def closure(model=model, task=task, seed=seed):
                task.zero_grad()
                value = loss(model, seed)
                value.backward()
                return value

            if closes:
                assert (task.step(closure=closure) if by_name else task.step(closure)).requires_grad
            else:
                closure()
                task.step()
        ends.append(parameters(model))
    assert error(*ends) == 0


@pytest.mark.parametrize("rule", ["ia", "kp"])
def test_lbfgs_steps_the_feedback_once_after_the_first_evaluation(rule):
    model = network(rule, torch.float64)
    task = torch.optim.LBFGS(pyfeedback.forward_parameters(model), lr=0.1, max_iter=5)
    follow(task, model, lr=0.1)
    seen = []

    def closure():
        task.zero_grad()
        value = loss(model, 0)
        value.backward()
        seen.append(feedback(model))
        return value

    first = task.step(closure)
    assert len(seen) > 2
    assert not any(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert are_equal(seen[1], seen[-1])
    assert task.step(closure) < first


def twice(model):
    task = OPTIMIZERS["SGD"](model.parameters())
    follow(task, model), follow(task, model)


def computed(model, **changes):
    nn.utils.parametrizations.weight_norm(model[4])
    for _, layer in pyfeedback.feedback_layers(model):
        layer.rule = pyfeedback.Rule(tie=1.0, decay=0.1, **changes)
    follow(OPTIMIZERS["SGD"](model.parameters()), model)


def with_data_and_tie(model):
    pyfeedback.convert(model, pyfeedback.Rule(tie=1.0, amp=0.1), optimizer=OPTIMIZERS["SGD"](model.parameters()))


class NoRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


def sgd(model):
    return OPTIMIZERS["SGD"](model.parameters())


BAD = {
    "no optimizer": (lambda m: follow("adam", m), TypeError, "optimizer is 'adam', expected a torch.optim.Optimizer"),
    "in convert": (
        lambda m: pyfeedback.convert(m, "sa", optimizer=3),
        TypeError,
        "optimizer is 3, expected a torch.op",
    ),
    "its own": (lambda m: follow(FeedbackSGD(m, 0.1), m), ValueError, "which steps feedback weights itself, expected"),
    "no model": (lambda m: follow(sgd(m), 3), TypeError, "model is a int, expected the converted model itself"),
    "plain model": (lambda m: follow(sgd(m), nn.Linear(2, 2)), ValueError, "model has no layer with a feedback weight"),
    "another model": (
        lambda m: follow(sgd(nn.Linear(2, 2)), m),
        ValueError,
        "optimizer has no weight of a feedback lay",
    ),
    "twice": (twice, ValueError, "optimizer already steps 0.feedback, expected one follow"),
    "lr": (lambda m: follow(sgd(m), m, lr=-1.0), ValueError, "lr is -1.0, expected a finite number, 0 or more"),
    "momentum": (lambda m: follow(sgd(m), m, momentum="0"), TypeError, "momentum is '0', expected a finite number"),
    "noise": (lambda m: follow(sgd(m), m, noise=None), TypeError, "noise is None, expected a finite number"),
    "steps": (lambda m: follow(sgd(m), m, total_steps=0), ValueError, "total_steps is 0, expected 1 or more"),
    "no lr": (lambda m: follow(NoRate(m.parameters()), m), ValueError, "lr is None and NoRate has no lr, expected a"),
    "tie and data": (
        with_data_and_tie,
        ValueError,
        "0 follows custom(amp=0.1, tie=1.0), which has tie and other terms",
    ),
    "tau": (lambda m: computed(m, tau=5.0), ValueError, "4.weight is computed from other parameters, expected a para"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind) as refused:
        call(network("ia"))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
