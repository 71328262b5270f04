"""FeedbackSGD has the trajectory of torch.optim.SGD, with and without gradients from autograd."""

import copy
import io
import math

import pytest
import torch
from small_networks import convnet, regression
from torch import nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback import Rule
from pyfeedback.optim import FeedbackSGD

# The coefficients are large enough for every term to affect the trajectory.
RULES = {
    "fa": Rule(name="fa"),
    "wm": Rule(amp=0.3, decay=0.2, center=True, name="wm"),
    "ia": Rule(amp=0.1, null=0.1, decay=0.1, center=True, name="ia"),
    "sa": Rule(self_=0.3, decay=0.2, name="sa"),
    "aa": Rule(amp=0.1, sparse=0.1, name="aa"),
    "kp": Rule(tie=1.0, decay=0.2, name="kp"),
    "mixed": Rule(self_=0.2, decay=0.1, tie=0.5, name="mixed"),
}
READ_DATA = [name for name, rule in RULES.items() if rule.reads_data]
WITHOUT_DATA = ["sa", "kp", "mixed"]
MOMENTA = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}


def network(rule, dtype=torch.float64):
    return pyfeedback.convert(convnet().to(dtype), RULES[rule] if isinstance(rule, str) else rule)


def batches(steps, dtype=torch.float64):
    return (regression(step, dtype=dtype) for step in range(steps))


def backward(model, x, target):
    model.zero_grad()
    F.mse_loss(model(x), target).backward()


def feedback_of(model):
    return [p.detach().clone() for p in pyfeedback.feedback_parameters(model)]


def train(model, feedback_optimizer, steps=6, **forward_options):
    """Step both optimizers after each backward pass, the feedback's first, since its rule may read W."""
    forward = torch.optim.SGD(pyfeedback.forward_parameters(model), **({"lr": 0.05} | forward_options))
    trajectory = []
    for x, target in batches(steps):
        backward(model, x, target)
        feedback_optimizer.step()
        forward.step()
        trajectory.append(feedback_of(model))
    return trajectory


def assert_trajectories(found, expected, tolerance=1e-11):
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert (x - y).abs().max() <= tolerance * y.abs().max(), f"step {step}, feedback {i}"


# Trajectories


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("rule", READ_DATA + WITHOUT_DATA)
def test_the_trajectory_is_that_of_torch_sgd_on_the_gradients_of_autograd(rule, momentum):
    model = network(rule)
    twin = copy.deepcopy(model)
    found = train(model, FeedbackSGD(model, lr=0.1, **MOMENTA[momentum]))
    sgd = torch.optim.SGD(pyfeedback.feedback_parameters(twin), lr=0.1, **MOMENTA[momentum])
    expected = train(twin, sgd)
    assert_trajectories(found, expected)
    assert all((a - b).norm() > 1e-3 * b.norm() for a, b in zip(found[-1], found[0], strict=True))  # the feedback moved


@pytest.mark.parametrize("rule", RULES)
def test_autograd_computes_no_feedback_gradient_unless_the_rule_reads_activations(rule):
    model = network(rule)
    FeedbackSGD(model, lr=0.1)
    x, target = next(batches(1))
    backward(model, x, target)
    for _, layer in pyfeedback.feedback_layers(model):
        assert layer.feedback.requires_grad == (rule in READ_DATA)
        assert (layer.feedback.grad is None) == (rule not in READ_DATA)


def test_the_rules_of_a_model_may_differ():
    model = network("fa")
    for layer, rule in ((model[0], "ia"), (model[3], "kp"), (model[5], "sa")):
        pyfeedback.convert(layer, RULES[rule])
    twin = copy.deepcopy(model)
    found = train(model, FeedbackSGD(model, lr=0.1, momentum=0.9))
    assert_trajectories(found, train(twin, torch.optim.SGD(pyfeedback.feedback_parameters(twin), lr=0.1, momentum=0.9)))


def test_fixed_feedback_does_not_change():
    model = network("fa")
    before = feedback_of(model)
    train(model, FeedbackSGD(model, lr=0.1, momentum=0.9))
    assert all(torch.equal(a, b) for a, b in zip(feedback_of(model), before, strict=True))


@pytest.mark.parametrize("rule", ["ia", "kp"])
def test_a_layer_without_a_gradient_is_skipped(rule):
    model = network(rule)
    optimizer = FeedbackSGD(model, lr=0.1, momentum=0.9)
    before = feedback_of(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(feedback_of(model), before, strict=True))
    assert not optimizer.state


# Kolen-Pollack


@pytest.mark.parametrize("lr", [0.02, 0.1])
def test_kolen_pollack_contracts_the_difference_geometrically(lr):
    """Without momentum, every step multiplies W - B by 1 - lr * decay, for any data."""
    model = network("kp")
    before = [(p.weight - p.feedback).detach() for _, p in pyfeedback.feedback_layers(model)]
    steps, decay = 20, RULES["kp"].decay
    train(model, FeedbackSGD(model, lr=lr), steps=steps, lr=lr, weight_decay=decay)
    for (_, layer), difference in zip(pyfeedback.feedback_layers(model), before, strict=True):
        expected = (1 - lr * decay) ** steps * difference
        assert ((layer.weight - layer.feedback) - expected).abs().max() <= 1e-12 * difference.abs().max()


@pytest.mark.parametrize("momentum", ["momentum", "nesterov"])
def test_kolen_pollack_contracts_with_momentum(momentum):
    """The difference follows the scalar recursion of SGD on decay/2 d^2, element by element."""
    model = network("kp")
    before = [(p.weight - p.feedback).detach() for _, p in pyfeedback.feedback_layers(model)]
    lr, decay, steps, options = 0.1, RULES["kp"].decay, 15, MOMENTA[momentum]
    train(model, FeedbackSGD(model, lr=lr, **options), steps=steps, lr=lr, weight_decay=decay, **options)
    factor, speed = 1.0, 0.0
    for _ in range(steps):
        gradient = decay * factor
        speed = 0.9 * speed + gradient
        factor -= lr * (gradient + 0.9 * speed if momentum == "nesterov" else speed)
    for (_, layer), difference in zip(pyfeedback.feedback_layers(model), before, strict=True):
        assert ((layer.weight - layer.feedback) - factor * difference).abs().max() <= 1e-12 * difference.abs().max()


# The interface of torch.optim


@pytest.mark.parametrize("rule", ["ia", "kp"])
def test_state_dict_round_trip(rule):
    """A run that is saved and loaded continues exactly as an uninterrupted one."""
    model = network(rule)
    optimizer = FeedbackSGD(model, lr=0.1, momentum=0.9)
    train(model, optimizer, steps=3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    expected = train(model, optimizer, steps=3)

    saved = torch.load(file, weights_only=True)
    other = network(rule)
    other.load_state_dict(saved["model"])
    resumed = FeedbackSGD(other, lr=0.5)
    resumed.load_state_dict(saved["optimizer"])
    found = train(other, resumed, steps=3)
    assert all(torch.equal(a, b) for f, e in zip(found, expected, strict=True) for a, b in zip(f, e, strict=True))


def test_a_scheduler_sets_the_learning_rate():
    model = network("sa")
    twin = copy.deepcopy(model)
    optimizers = [FeedbackSGD(model, lr=0.2), torch.optim.SGD(pyfeedback.feedback_parameters(twin), lr=0.2)]
    for optimizer, net in zip(optimizers, (model, twin), strict=True):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        for x, target in batches(4):
            backward(net, x, target)
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 / 16)
    assert_trajectories([feedback_of(model)], [feedback_of(twin)])


@pytest.mark.parametrize("optimizer", [FeedbackSGD, pyfeedback.optim.SGD])
@pytest.mark.parametrize("rule", ["kp", "sa", "ia"])
def test_a_learning_rate_that_is_a_tensor_is_read_at_each_step(rule, optimizer):
    models = [network(rule) for _ in range(2)]
    rates = [0.05, torch.tensor(0.05, dtype=torch.float64)]
    optimizers = [optimizer(model, lr=lr, momentum=0.9) for model, lr in zip(models, rates, strict=True)]
    for step, (x, target) in enumerate(batches(4)):
        optimizers[0].param_groups[0]["lr"] = 0.05 / (1 + step)
        if optimizer is pyfeedback.optim.SGD:
            optimizers[0].param_groups[1]["lr"] = 0.05 / (1 + step)
        rates[1].fill_(0.05 / (1 + step))
        for model, each in zip(models, optimizers, strict=True):
            backward(model, x, target)
            each.step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_noise_under_a_tensor_learning_rate_follows_the_seed_and_is_fresh_at_every_step():
    def steps():
        model = network("sa")
        optimizer = FeedbackSGD(model, lr=torch.tensor(1.0), noise=0.1)
        torch.manual_seed(5)
        trajectory = [feedback_of(model)]
        for _ in range(2):
            optimizer.step()
            trajectory.append(feedback_of(model))
        return trajectory

    first, second = steps(), steps()
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    moves = [[b - a for a, b in zip(*pair, strict=True)] for pair in (first[:2], first[1:])]
    assert not torch.allclose(moves[0][0], moves[1][0], atol=0.05)


def test_step_accepts_a_closure():
    model = network("ia")
    x, target = next(batches(1))

    def closure():
        model.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        return loss

    before = feedback_of(model)
    loss = FeedbackSGD(model, lr=0.1).step(closure)
    assert loss.requires_grad
    assert all(not torch.equal(a, b) for a, b in zip(feedback_of(model), before, strict=True))


def test_zero_grad_clears_only_the_feedback():
    model = network("ia")
    optimizer = FeedbackSGD(model, lr=0.1)
    x, target = next(batches(1))
    backward(model, x, target)
    optimizer.zero_grad()
    assert {layer.feedback.grad for _, layer in pyfeedback.feedback_layers(model)} == {None}
    assert all(p.grad is not None for p in pyfeedback.forward_parameters(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["ia", "kp"])
def test_the_dtype_of_the_feedback_is_kept(rule, dtype):
    model = network(rule, dtype)
    optimizer = FeedbackSGD(model, lr=0.1, momentum=0.9)
    x, target = next(batches(1, dtype))
    backward(model, x, target)
    before = feedback_of(model)
    optimizer.step()
    assert {p.dtype for p in pyfeedback.feedback_parameters(model)} == {dtype}
    assert all(not torch.equal(a, b) for a, b in zip(feedback_of(model), before, strict=True))


# Noise


@pytest.mark.parametrize("rule", ["fa", "ia", "kp"])
def test_noise_follows_the_seed(rule):
    ends = []
    for seed in (3, 3, 4):
        model = network(rule)
        optimizer = FeedbackSGD(model, lr=0.1, noise=0.5)
        torch.manual_seed(seed)
        ends.append(train(model, optimizer, steps=2)[-1])
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(ends[0], ends[2], strict=True))


def test_noise_is_normal_and_fresh_at_every_step_and_layer():
    layers = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 100)).double()
    model = pyfeedback.convert(layers, "fa")
    optimizer = FeedbackSGD(model, lr=0.1, noise=0.5)
    torch.manual_seed(5)
    drawn, before = [], feedback_of(model)
    for _ in range(2):
        optimizer.step()
        after = feedback_of(model)
        drawn += [((a - b) / (0.1 * 0.5)).flatten() for a, b in zip(after, before, strict=True)]
        before = after
    for noise in drawn:
        assert abs(noise.mean()) < 5 / len(noise) ** 0.5
        assert noise.std() == pytest.approx(1, rel=0.05)
        assert (noise.abs() < 1).double().mean() == pytest.approx(math.erf(0.5**0.5), abs=0.03)
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(4)
    assert correlation.abs().max() < 5 / 5000**0.5


def test_without_noise_the_random_state_is_left():
    model = network("kp")
    optimizer = FeedbackSGD(model, lr=0.1)
    x, target = next(batches(1))
    backward(model, x, target)
    state = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)


# Nonfinite gradients


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("rule", ["ia", "kp"])
def test_skip_nonfinite_skips_the_step(rule, bad):
    model = network(rule)
    optimizer = FeedbackSGD(model, lr=0.1, momentum=0.9, skip_nonfinite=True)
    train(model, optimizer, steps=2)
    x, target = next(batches(1))
    backward(model, x, target)
    with torch.no_grad():
        (model[3].feedback if rule == "ia" else model[3].weight).grad[0, 0] = bad
    before, buffers = feedback_of(model), [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(feedback_of(model), before, strict=True))
    assert all(torch.equal(s["momentum_buffer"], b) for s, b in zip(optimizer.state.values(), buffers, strict=True))
    backward(model, x, target)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(feedback_of(model), before, strict=True))


def test_skip_nonfinite_changes_no_good_step():
    ends = []
    for skip in (False, True):
        model = network("ia")
        ends.append(train(model, FeedbackSGD(model, lr=0.1, momentum=0.9, skip_nonfinite=skip), steps=3)[-1])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_without_skip_nonfinite_a_nan_propagates_as_in_torch():
    model = network("kp")
    optimizer = FeedbackSGD(model, lr=0.1)
    x, target = next(batches(1))
    backward(model, x, target)
    model[3].weight.grad[0, 0] = math.nan
    optimizer.step()
    assert model[3].feedback[0, 0].isnan()
    assert model[3].feedback.isnan().sum() == 1
    assert model[0].feedback.isfinite().all()


# Errors


@pytest.mark.parametrize("name", ["lr", "momentum", "noise"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_number_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected a finite number, 0 or more"):
        FeedbackSGD(network("ia"), **({"lr": 0.1} | {name: value}))


def test_nesterov_requires_momentum():
    with pytest.raises(ValueError, match="nesterov is True with momentum 0"):
        FeedbackSGD(network("ia"), lr=0.1, nesterov=True)


def test_a_model_without_feedback_layers_is_refused():
    with pytest.raises(ValueError, match="model has no layer with a feedback weight"):
        FeedbackSGD(nn.Linear(2, 3), lr=0.1)


def test_under_backprop_there_is_nothing_to_step():
    model = pyfeedback.nn.Linear(2, 3, rule="bp")
    before = copy.deepcopy(model.state_dict())
    optimizer = FeedbackSGD(model, lr=0.1)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_group_of_other_parameters_is_refused():
    model = network("ia")
    with pytest.raises(ValueError, match="params contains a tensor of shape"):
        FeedbackSGD(model, lr=0.1).add_param_group({"params": list(pyfeedback.forward_parameters(model))})


def test_model_and_optimizer_are_copied_together():
    model = pyfeedback.nn.Linear(3, 2, rule="sa")
    optimizer = FeedbackSGD(model, lr=0.1, momentum=0.9)
    optimizer.step()
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for each in (optimizer, twin_optimizer):
        each.step()
    assert torch.equal(twin.feedback, model.feedback)
    assert twin.feedback is not model.feedback
