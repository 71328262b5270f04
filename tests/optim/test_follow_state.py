"""The state of followed optimizers is saved, loaded and copied; which optimizer steps which feedback weights."""

import copy
import gc
import io
import logging
import pickle

import pytest
import torch
from followed import OPTIMIZERS, SEEN, error, feedback, loss, network, parameters
from small_networks import normalized_convnet, perceptron

import pyfeedback
from pyfeedback.optim import follow
from pyfeedback.optim.rows import weight_parameters


def are_equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# States and copies


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", SEEN)
def test_a_saved_run_resumes_bit_for_bit(rule, optimizer):
    def start():
        model = network(rule)
        task = OPTIMIZERS[optimizer](model.parameters())
        return model, task, follow(task, model)

    def train(model, task, seeds):
        for seed in seeds:
            task.zero_grad()
            loss(model, seed).backward()
            task.step()

    model, task, follower = start()
    follower.probe_seed = 5
    train(model, task, range(3))
    file = io.BytesIO()
    torch.save([model.state_dict(), task.state_dict()], file)
    file.seek(0)
    resumed, again, _ = start()
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert set(saved[1]) == {"state", "param_groups", "pyfeedback"}
    for each in ((model, task), (resumed, again)):
        train(*each, range(3, 6))
    assert error(parameters(resumed), parameters(model)) == 0
    plain = OPTIMIZERS[optimizer](copy.deepcopy(model).parameters())
    plain.load_state_dict(saved[1])  # an optimizer that is not followed ignores the state of the feedback weights


def test_two_models_of_one_optimizer_are_saved_and_loaded():
    def start():
        models = [network("ia"), network("ia-probes")]
        task = OPTIMIZERS["SGD"]([p for model in models for p in model.parameters()])
        return models, task, [follow(task, model) for model in models]

    models, task, _ = start()
    for seed in range(4):
        task.zero_grad()
        (loss(models[0], seed) + loss(models[1], seed)).backward()
        task.step()
        if seed == 1:
            others, again, followers = start()
            for model, other in zip(models, others, strict=True):
                other.load_state_dict(model.state_dict())
            again.load_state_dict(copy.deepcopy(task.state_dict()))
            assert [f.param_groups[0].get("feedback_step") for f in followers] == [None, 1]
        elif seed > 1:
            again.zero_grad()
            (loss(others[0], seed) + loss(others[1], seed)).backward()
            again.step()
    assert all(error(parameters(o), parameters(m)) == 0 for o, m in zip(others, models, strict=True))


def test_a_state_without_feedback_weights_gives_a_warning(caplog):
    model = network("ia")
    task = OPTIMIZERS["SGD"](model.parameters())
    state = task.state_dict()
    follow(task, model)
    with caplog.at_level(logging.WARNING, "pyfeedback"):
        task.load_state_dict(state)
    assert "state_dict has no state of the feedback weights: their momentum and steps begin anew" in caplog.text


def test_a_state_of_another_model_is_refused():
    nets = network("ia"), perceptron(2, 3)
    task, other = (OPTIMIZERS["SGD"](net.parameters()) for net in nets)
    follow(task, nets[0])
    pyfeedback.convert(nets[1], "ia", optimizer=other)
    with pytest.raises(ValueError, match="state_dict has 1 feedback weights, expected 3"):
        task.load_state_dict(other.state_dict())


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, lambda task: pickle.loads(pickle.dumps(task))])
def test_a_copy_of_the_optimizer_gives_a_warning(make, caplog):
    model = network("ia")
    task = OPTIMIZERS["SGD"](model.parameters())
    follow(task, model)
    loss(model, 0).backward()
    with caplog.at_level(logging.WARNING, "pyfeedback"):
        other = make(task)
    assert [record.getMessage() for record in caplog.records] == [
        "a copy of SGD does not step the feedback weights: call pyfeedback.optim.follow on the copy"
    ]
    before = feedback(model)
    other.step()
    assert are_equal(feedback(model), before)
    task.step()
    assert not are_equal(feedback(model), before)


# Conversion, and what it is that steps B


def test_an_optimizer_that_was_built_before_the_conversion_is_followed():
    twin, model = network("ia"), normalized_convnet()
    task, theirs = OPTIMIZERS["SGD"](model.parameters()), OPTIMIZERS["SGD"](pyfeedback.forward_parameters(twin))
    assert pyfeedback.convert(model, SEEN["ia"], optimizer=task) is model
    follow(theirs, twin)
    for net, each in ((model, task), (twin, theirs)):
        loss(net, 0).backward()
        each.step()
    assert error(parameters(model), parameters(twin)) == 0


def test_an_optimizer_that_changes_feedback_without_a_gradient_is_refused():
    class Decays(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(0.99)

    model = network("ia")
    task = Decays(model.parameters(), lr=0.1)
    follow(task, model)
    loss(model, 0).backward()
    with pytest.raises(
        RuntimeError, match=r"Decays changed 0\.feedback, which had no gradient, expected an optimizer of"
    ):
        task.step()


def test_each_of_two_optimizers_steps_the_layers_whose_weights_it_has(caplog):
    model = network("ia")
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD([*model[4].parameters(), *model[5].parameters()], lr=0.1)
    with caplog.at_level(logging.WARNING, "pyfeedback"):
        follow(first, model), follow(second, model)
    assert "the optimizer has no weight of these layers, so it does not step their feedback: 4, 5" in caplog.text
    loss(model, 0).backward()
    moved = []
    for task in (first, second):
        before = feedback(model)
        task.step()
        moved.append([not torch.equal(a, b) for a, b in zip(feedback(model), before, strict=True)])
    assert moved == [[True, False, False], [False, True, True]]


def test_a_new_optimizer_takes_over(caplog):
    model = network("ia")
    tasks = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    with caplog.at_level(logging.WARNING, "pyfeedback"):
        follow(tasks[0], model), follow(tasks[1], model)
    assert "another optimizer has stepped the feedback of these layers until now: 0, 4, 5" in caplog.text
    for task, moves in zip(tasks, (False, True), strict=True):
        loss(model, 0).backward()
        before = feedback(model)
        task.step()
        assert are_equal(feedback(model), before) != moves


def test_without_its_optimizer_gradients_stay():
    model = network("ia")
    follow(OPTIMIZERS["SGD"](model.parameters()), model)
    gc.collect()
    loss(model, 0).backward()
    assert all(b.grad is not None for b in pyfeedback.feedback_parameters(model))
    assert not any(layer.has_optimizer for _, layer in pyfeedback.feedback_layers(model))


def test_a_frozen_layer_still_learns_its_feedback():
    model = network("sa")
    model[4].weight.requires_grad_(False)
    task = torch.optim.SGD([p for p in pyfeedback.forward_parameters(model) if p.requires_grad], lr=0.1)
    follow(task, model)
    loss(model, 0).backward()
    before = feedback(model)
    task.step()
    assert not any(torch.equal(a, b) for a, b in zip(feedback(model), before, strict=True))


def test_an_unconverted_model_is_stepped_as_before_the_conversion():
    model, plain = network("ia"), normalized_convnet()
    tasks = [OPTIMIZERS["SGD"](net.parameters()) for net in (model, plain)]
    follow(tasks[0], model)
    pyfeedback.unconvert(model)
    for net, task in zip((model, plain), tasks, strict=True):
        loss(net, 0).backward()
        task.step()
    assert error(parameters(model), parameters(plain)) == 0


def test_a_model_that_is_converted_again_is_followed_again():
    model = network("ia")
    task = torch.optim.SGD(pyfeedback.forward_parameters(model), lr=0.1)
    follow(task, model)
    pyfeedback.convert(model, "sa")
    with pytest.raises(RuntimeError, match=r"0 was converted again, expected pyfeedback\.convert\(model, rule, optim"):
        task.step()
    pyfeedback.convert(model, "sa", optimizer=task)
    loss(model, 0).backward()
    before = feedback(model)
    task.step()
    assert not any(torch.equal(a, b) for a, b in zip(feedback(model), before, strict=True))


@pytest.mark.parametrize("rule", ["bp", "fa"])
def test_rules_without_a_step_have_nothing_to_follow(rule):
    model = network(rule)
    task = OPTIMIZERS["Adam"](pyfeedback.forward_parameters(model))
    follower = follow(task, model)
    loss(model, 0).backward()
    task.step()
    task.load_state_dict(task.state_dict())
    assert follower.time_constants() == {}


def test_the_reports_of_the_follower():
    model = network("ia-probes")
    task = OPTIMIZERS["Adam"](model.parameters())
    follower = follow(task, model)
    assert follower.time_constants() == {"0": 5.0, "4": 5.0, "5": 5.0}
    assert set(follower.probe_counts()) == {"0", "4", "5"}
    assert follower.optimizer is task
    follower.release()
    loss(model, 0).backward()
    before = feedback(model)
    task.step()
    assert are_equal(feedback(model), before)


def test_a_slow_rule_gives_a_warning(caplog):
    model = network("sa")
    with caplog.at_level(logging.WARNING, "pyfeedback"):
        follow(torch.optim.Adam(model.parameters(), lr=1e-3), model, total_steps=100)
    assert "they move to their targets in too many steps (0 3333, 4 3333, 5 3333) for a run of 100" in caplog.text


def test_convert_refuses_what_cannot_be_followed_before_it_changes_the_model():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    foreign = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    tied = pyfeedback.Rule(tie=1.0, amp=0.1)
    for rule, optimizer, message in (
        ("ia", foreign, "^optimizer has no weight of a feedback layer of model"),
        (tied, own, "^0 follows custom.*, which has tie and other terms"),
        ("ia", "SGD", "^optimizer is 'SGD', expected a torch.optim.Optimizer"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            pyfeedback.convert(model, rule, optimizer=optimizer)
        assert type(model[0]) is torch.nn.Linear


def test_the_weight_of_a_parametrized_product_is_not_its_feedback():
    class Gained(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.weight_gain = (torch.nn.Parameter(torch.randn(n, 4)) for n in (4, 1))

        def forward(self, x):
            return x @ self.weight.t() * self.weight_gain

    model = pyfeedback.convert(Gained(), "kp")
    torch.nn.utils.parametrizations.weight_norm(model)
    ((_, layer),) = pyfeedback.feedback_layers(model)
    found = {id(p) for p in weight_parameters(layer)}
    assert found == {id(p) for p in model.parametrizations.weight.parameters()}
