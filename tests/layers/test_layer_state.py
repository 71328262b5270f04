"""Layers: construction, factory arguments, copies and checkpoints."""

import copy
import io
import math
import pickle

import pytest
import torch
from layer_cases import KINDS, assert_same, gradients, plain_twin, small_layer
from torch import nn

import pyfeedback


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_factory_dtype(dtype):
    for layer in (
        pyfeedback.nn.Conv2d(3, 4, 3, dtype=dtype, rule="ia"),
        pyfeedback.nn.Linear(3, 4, dtype=dtype, rule="ia"),
    ):
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert layer.feedback.isfinite().all()


BIG_LAYERS = {
    "conv": lambda **options: pyfeedback.nn.Conv2d(40, 80, 3, rule="ia", **options),
    "linear": lambda **options: pyfeedback.nn.Linear(400, 200, rule="ia", **options),
}


@pytest.mark.parametrize("make", BIG_LAYERS.values(), ids=BIG_LAYERS)
def test_meta_device_then_empty_then_reset(make):
    layer = make(device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(math.nan)
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    assert layer.feedback.requires_grad


@pytest.mark.parametrize("rule", ["fa", "ia", "aa"])
@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors_flow_through_both_passes(kind, rule):
    layer, x = small_layer(kind, rule)
    shapes = {name: None if g is None else g.shape for name, g in gradients(layer, x).items()}
    layer, x = layer.to("meta"), x.to("meta").requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    y.backward(torch.empty_like(y))
    found = {"input": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    assert {name: None if g is None else g.shape for name, g in found.items()} == shapes


@pytest.mark.parametrize("make", BIG_LAYERS.values(), ids=BIG_LAYERS)
def test_reset_draws_feedback_from_the_distribution_of_the_weight(make):
    torch.manual_seed(7)
    layer = make()
    bound = layer.weight[0].numel() ** -0.5
    drawn = layer.feedback.detach().clone()
    for values in (drawn, layer.weight.detach()):
        assert values.abs().max() <= bound
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert abs(values.mean()) < 0.02 * bound
    assert abs(pyfeedback.metrics.angle(drawn, layer.weight) - 90) < 3
    layer.reset_parameters()
    assert abs(pyfeedback.metrics.angle(drawn, layer.feedback) - 90) < 3
    assert layer.feedback.detach().std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_weights_are_drawn_as_torch_nn_draws_them():
    """The feedback is drawn after the weight and the bias."""
    torch.manual_seed(8)
    layer = pyfeedback.nn.Conv2d(3, 4, 3, rule="ia")
    torch.manual_seed(8)
    assert torch.equal(layer.weight, nn.Conv2d(3, 4, 3).weight)


@pytest.mark.parametrize("rule", ["bp", "fa", "ia"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_equal_and_independent(kind, duplicate, rule):
    layer, x = small_layer(kind, rule)
    twin = duplicate(layer)
    assert type(twin) is type(layer)
    assert twin.rule == layer.rule
    assert [(n, p.requires_grad) for n, p in twin.named_parameters()] == [
        (n, p.requires_grad) for n, p in layer.named_parameters()
    ]
    assert_same(gradients(twin, x), gradients(layer, x))
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert not any(torch.equal(p, q) for p, q in zip(twin.parameters(), layer.parameters(), strict=True))


@pytest.mark.parametrize("rule", ["bp", "fa", "ia"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind, rule):
    layer, x = small_layer(kind, rule)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin, _ = small_layer(kind, rule)
    twin.reset_parameters()
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert_same(twin.state_dict(), layer.state_dict())
    assert_same(gradients(twin, x), gradients(layer, x))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_of_the_plain_layer_loads_and_the_missing_feedback_is_logged(kind, caplog):
    layer, _ = small_layer(kind, "ia")
    plain = plain_twin(layer)
    plain.reset_parameters()
    feedback = layer.feedback.detach().clone()
    result = nn.Sequential(layer).load_state_dict(nn.Sequential(plain).state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.feedback, feedback)
    assert "0.feedback" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_without_a_weight_is_refused(kind):
    layer, _ = small_layer(kind, "ia")
    with pytest.raises(RuntimeError, match="weight"):
        layer.load_state_dict({"bias": layer.bias, "feedback": layer.feedback})


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_loads_back_into_the_plain_layer(kind):
    layer, _ = small_layer(kind, "ia")
    plain = plain_twin(layer)
    plain.reset_parameters()
    result = plain.load_state_dict(layer.state_dict(), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], ["feedback"])
    assert torch.equal(layer.weight, plain.weight)


def test_extra_repr_is_torch_nn_s_and_the_rule():
    assert repr(pyfeedback.nn.Linear(3, 4, rule="fa")) == "Linear(in_features=3, out_features=4, bias=True, rule=fa())"
    assert repr(pyfeedback.nn.Conv2d(3, 4, 3, padding=1, rule="kp")) == (
        "Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), rule=kp(decay=0.002, tie=1.0))"
    )


def test_input_of_another_dtype_is_refused():
    with pytest.raises(TypeError, match=r"weight has dtype torch\.float32, expected that of input, torch\.float64"):
        pyfeedback.nn.Linear(3, 4)(torch.randn(2, 3, dtype=torch.float64))
