"""Common operations on a PyTorch model, applied to a converted one."""

import copy

import pytest
import torch
from cases import largest_error
from small_networks import RULES, classification, pointwise_convnet
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import pyfeedback


def network(rule):
    return pyfeedback.convert(pointwise_convnet(), RULES[rule])


def backward(model, seed=0):
    model.zero_grad()
    x, target = classification(seed)
    nn.functional.cross_entropy(model(x), target).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Autocast and GradScaler


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_autocast_trains_as_a_model_in_that_dtype(rule, dtype):
    model, x = network(rule), classification()[0]
    narrow = copy.deepcopy(model).to(dtype)
    with torch.autocast("cpu", dtype):
        y = model(x)
    y.float().square().mean().backward()
    narrow(x.to(dtype)).float().square().mean().backward()
    for p, expected in zip(model.parameters(), narrow.parameters(), strict=True):
        assert p.grad is expected.grad is None or torch.equal(p.grad, expected.grad.float())


@pytest.mark.parametrize("rule", RULES)
def test_the_documented_gradient_scaling_equals_training_without_it(rule):
    """The scaler unscales and steps the task. The rule's optimizer steps in between, before W is updated."""
    trained = []
    for scale in (None, 1024.0):
        model = network(rule)
        task = torch.optim.SGD(pyfeedback.forward_parameters(model), lr=0.1, momentum=0.9)
        feedback = pyfeedback.optim.FeedbackSGD(model, lr=0.1, momentum=0.9, skip_nonfinite=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(3):
            model.zero_grad()
            x, target = classification(step)
            scaler.scale(nn.functional.cross_entropy(model(x), target)).backward()
            scaler.unscale_(task)  # the gradients of W; those of the rules were never scaled
            feedback.step()
            scaler.step(task)
            scaler.update()
        trained.append(list(model.parameters()))
    assert largest_error(*([p.detach() for p in each] for each in trained)) < 1e-5


@pytest.mark.parametrize("rule", ["ia", "kp", "sa"])
def test_an_overflowing_step_changes_nothing(rule):
    model = network(rule)
    task = torch.optim.SGD(pyfeedback.forward_parameters(model), lr=0.1)
    feedback = pyfeedback.optim.FeedbackSGD(model, lr=0.1, skip_nonfinite=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=float("inf") if rule == "kp" else 1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    x, target = classification()
    x[0, 0, 0, 0] = float("inf")
    scaler.scale(nn.functional.cross_entropy(model(x), target)).backward()
    scaler.unscale_(task)
    if rule != "sa":  # symmetric alignment reads only the weights, and updates the feedback
        feedback.step()
    scaler.step(task)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


# Weights computed from other parameters


@pytest.mark.parametrize("rule", RULES)
def test_weight_norm_and_other_parametrizations(rule):
    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    for wrap in (parametrizations.weight_norm, lambda m: parametrize.register_parametrization(m, "weight", Doubled())):
        plain, model = network(rule), network(rule)
        if rule != "bp":
            model[0].feedback.data.copy_(plain[0].feedback)
        wrap(model[0])
        plain[0].weight.data.copy_(model[0].weight.detach())
        for other in (2, 4):
            model[other].load_state_dict(plain[other].state_dict())
        expected, found = backward(plain), backward(model)
        for name in expected.keys() & found.keys():
            assert largest_error([found[name]], [expected[name]]) < 1e-5, name
        assert any("original" in name for name in found)
        assert type(model[0].weight) is torch.Tensor


# Hooks, frozen parts, sharing


@pytest.mark.parametrize("rule", RULES)
def test_hooks_run_and_see_the_gradients(rule):
    model, seen = network(rule), []
    model[2].register_forward_pre_hook(lambda m, inputs: seen.append("pre"))
    model[2].register_forward_hook(lambda m, inputs, output: seen.append("forward"))
    model[2].register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_in[0].shape))
    model[2].weight.register_hook(lambda grad: seen.append(grad.shape))
    backward(model)
    assert seen[:2] == ["pre", "forward"]
    assert set(seen[2:]) == {torch.Size([8, 4, 4, 4]), torch.Size([6, 4, 1, 1])}


@pytest.mark.parametrize("rule", RULES)
def test_a_shared_layer_sums_the_gradients_of_its_uses(rule):
    torch.manual_seed(0)
    layer = pyfeedback.nn.Linear(6, 6, bias=False, rule=RULES[rule])
    x = torch.randn(5, 6)
    twice = backward_of(layer, lambda: layer(layer(x)))
    inner = layer(x).detach().requires_grad_()
    outer = backward_of(layer, lambda: layer(inner))
    first = backward_of(layer, lambda: layer(x), inner.grad)
    for name in twice:
        assert largest_error([twice[name]], [outer[name] + first[name]]) < 1e-5, name


def backward_of(layer, run, grad_output=None):
    layer.zero_grad()
    output = run()
    output.backward(torch.ones_like(output) if grad_output is None else grad_output)
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


# Whole models


@pytest.mark.parametrize("rule", RULES)
def test_deterministic_mode_repeats_bit_for_bit(rule):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = backward(network(rule)), backward(network(rule))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rule", RULES)
def test_functional_call_and_saved_weights(rule, tmp_path):
    model = network(rule)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    x, _ = classification()
    torch.testing.assert_close(torch.func.functional_call(network(rule), state, (x,)), model(x))


@pytest.mark.parametrize("rule", RULES)
def test_an_ensemble_is_a_vmap_over_models(rule):
    models, x = [network(rule).double() for _ in range(3)], classification()[0].double()
    for model in models[1:]:
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)

    def loss(parameters):
        return torch.func.functional_call(models[0], parameters, (x,)).square().sum()

    parameters, _ = torch.func.stack_module_state(models)
    stacked = torch.func.vmap(torch.func.grad(loss))(parameters)
    for i, model in enumerate(models):
        model(x).square().sum().backward()
        for name, p in model.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(stacked[name][i], expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("rule", RULES)
def test_a_whole_model_compiles_without_a_break(rule):
    torch._dynamo.reset()
    model = network(rule)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    expected, found = backward(model), backward(compiled)
    for name, grad in expected.items():
        assert largest_error([found[f"_orig_mod.{name}"]], [grad]) < 1e-5, name


@pytest.mark.parametrize("rule", RULES)
def test_a_plain_checkpoint_resumes_in_a_converted_model_and_back(rule):
    plain, model = pointwise_convnet(), network(rule)
    for p in plain.parameters():
        nn.init.normal_(p)
    model.load_state_dict(plain.state_dict())  # strict
    x, _ = classification()
    torch.testing.assert_close(model(x), plain(x))
    plain.load_state_dict(pyfeedback.unconvert(model).state_dict())


def test_autocast_leaves_float64():
    x, w, b = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        for op in (pyfeedback.functional.fa_linear, torch.ops.pyfeedback.fa_linear):
            assert op(x, w, b).dtype == torch.nn.functional.linear(x, w).dtype == torch.float64
