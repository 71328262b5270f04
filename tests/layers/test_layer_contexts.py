"""Layers under torch.func, in channels_last, under autocast and activation checkpointing, and in training."""

import copy

import pytest
import torch
from layer_cases import (
    KINDS,
    RULES,
    assert_close,
    assert_same,
    conv_input,
    conv_layer,
    gradients,
    output_gradient,
    plain_twin,
    small_layer,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pyfeedback

# torch.func


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_func_grad(kind, rule):
    layer, x = small_layer(kind, rule, dtype=torch.float64)
    expected = gradients(layer, x)
    y = layer(x)
    grad_output = output_gradient(y)

    def loss(parameters, x):
        return (torch.func.functional_call(layer, parameters, (x,)) * grad_output).sum()

    by_parameter, by_input = torch.func.grad(loss, argnums=(0, 1))(dict(layer.named_parameters()), x)
    for name, value in expected.items():
        if value is not None:
            assert torch.allclose({"input": by_input, **by_parameter}[name], value, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func_vmap(kind):
    layer, x = small_layer(kind, "ia", dtype=torch.float64)
    stack = torch.stack([x, 2 * x, -x])
    expected = torch.stack([layer(part) for part in stack])
    assert torch.allclose(torch.func.vmap(layer)(stack), expected, rtol=1e-12, atol=1e-12)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    parameters = dict(layer.named_parameters())
    stacked = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, stack)
    for i, part in enumerate(stack):
        alone = torch.func.grad(loss)(parameters, part)
        assert all(torch.allclose(stacked[name][i], alone[name], rtol=1e-12, atol=1e-12) for name in parameters)


# Memory format


@pytest.mark.parametrize("case", ["padded", "strided", "grouped", "1x1", "1x1_strided"])
@pytest.mark.parametrize("rule", ["fa", "ia", "aa"])
def test_gradients_keep_channels_last(case, rule):
    torch.manual_seed(5)
    layer = conv_layer(case, RULES[rule], dtype=torch.float64)
    x = conv_input(case, dtype=torch.float64)
    expected = gradients(layer, x)
    layer = layer.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(output_gradient(y))
    assert x.grad.stride() == x.stride()
    assert layer.weight.grad.stride() == layer.weight.stride()
    found = {"input": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    assert_close(found, expected)
    if layer.feedback.grad is not None:
        assert layer.feedback.grad.stride() == layer.feedback.stride() == layer.weight.stride()


# Autocast


def bf16_gradients(layer, x):
    """Autocast by hand: cast all inputs to bfloat16, and cast every gradient back."""
    grads = gradients(copy.deepcopy(layer).bfloat16(), x.bfloat16())
    return {name: None if g is None else g.float() for name, g in grads.items()}


AUTOCAST_INPUTS = {
    "conv": (lambda rule: pyfeedback.nn.Conv2d(4, 8, 3, padding=1, rule=rule), (4, 4, 6, 6)),
    "linear": (lambda rule: pyfeedback.nn.Linear(16, 8, rule=rule), (6, 16)),
    "linear_3d": (lambda rule: pyfeedback.nn.Linear(16, 8, rule=rule), (6, 3, 16)),
}


@pytest.mark.parametrize("inside", [False, True], ids=["backward_outside", "backward_inside"])
@pytest.mark.parametrize("rule", ["bp", *RULES])
@pytest.mark.parametrize("kind", AUTOCAST_INPUTS)
def test_autocast(kind, rule, inside):
    torch.manual_seed(6)
    make, shape = AUTOCAST_INPUTS[kind]
    layer = make(RULES.get(rule, rule))
    x = torch.randn(shape).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype is torch.bfloat16
        assert torch.equal(y, plain_twin(layer)(x))
        grad_output = output_gradient(y)
        if inside:
            y.backward(grad_output)
    if not inside:
        y.backward(grad_output)
    found = {"input": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    assert {g.dtype for g in found.values() if g is not None} == {torch.float32}
    if rule != "bp":  # the rounding of torch's own backward is not tested
        assert_same(found, bf16_gradients(layer, x))


# Training


def small_network(rule, dtype=torch.float32):
    torch.manual_seed(9)
    return pyfeedback.convert(
        nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, stride=2), nn.Tanh(), nn.Flatten(),
            nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 3),
        ).to(dtype),
        rule,
    )  # fmt: skip


@pytest.mark.parametrize("rule", ["bp", "fa", "wm", "ia", "sa", "aa", "kp"])
def test_training_lowers_the_loss(rule):
    model = small_network(rule)
    x, target = torch.randn(16, 2, 6, 6), torch.randn(16, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("rule", ["bp", *RULES])
def test_activation_checkpoint_gives_equal_gradients(rule, use_reentrant):
    model = small_network(RULES.get(rule, rule))
    x = torch.randn(4, 2, 6, 6)

    def forward(x):
        return checkpoint(model, x, use_reentrant=use_reentrant)

    assert_same(gradients(model, x, forward=forward), gradients(model, x))


@pytest.mark.parametrize("rule", ["ia", "kp"])
def test_an_average_of_models_has_the_average_of_the_feedback(rule):
    model = small_network(RULES.get(rule, rule))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    expected = [p.detach() / 2 for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    average.update_parameters(model)
    expected = [half + p.detach() / 2 for half, p in zip(expected, model.parameters(), strict=True)]
    torch.testing.assert_close([p.detach() for p in average.module.parameters()], expected)
    assert len(list(pyfeedback.feedback_parameters(average))) == len(list(pyfeedback.feedback_parameters(model))) > 0


@pytest.mark.filterwarnings("ignore")  # of torch.distributed.checkpoint without processes
def test_a_distributed_checkpoint_of_one_process_is_saved_and_loaded(tmp_path):
    from torch.distributed import checkpoint as distributed

    saved, model = small_network("kp"), small_network("kp")
    distributed.save({"model": saved.state_dict()}, checkpoint_id=tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    state = {"model": model.state_dict()}
    distributed.load(state, checkpoint_id=tmp_path)
    model.load_state_dict(state["model"])
    assert_same(model.state_dict(), saved.state_dict())


@pytest.mark.parametrize("rule", ["wm", "ia", "sa", "aa", "kp"])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_of_two_half_batches(kind, rule):
    """The regularizer is a mean over the samples of a backward pass, and decay is per pass: two passes add them twice.

    The gradients of the task, and with them tie, are sums over samples. The rule is uncentered, since the halves have
    different means.
    """
    layer, x = small_layer(kind, pyfeedback.rule(RULES[rule], center=False), dtype=torch.float64)
    rule = layer.rule
    y = layer(x)
    grad_output = output_gradient(y)
    whole = gradients(layer, x, grad_output)
    layer.zero_grad(set_to_none=True)
    for part, grad in zip(x.chunk(2), grad_output.chunk(2), strict=True):
        layer(part).backward(grad)
    assert torch.allclose(layer.weight.grad, whole["weight"], rtol=1e-12, atol=1e-12)
    assert torch.allclose(layer.bias.grad, whole["bias"], rtol=1e-12, atol=1e-12)
    tied = rule.tie * whole["weight"]
    assert torch.allclose(layer.feedback.grad, 2 * (whole["feedback"] - tied) + tied, rtol=1e-12, atol=1e-12)
