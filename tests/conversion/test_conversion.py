"""Conversion keeps the objects of a model, and gives correct gradients with in-place activations."""

import copy
import logging
import math

import layer_cases
import pytest
import torch
from small_networks import perceptron
from torch import nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback import Rule, reference

RULES = {"bp": pyfeedback.rule("bp")} | {name: layer_cases.RULES[name] for name in ("fa", "wm", "ia", "sa", "aa", "kp")}
READ_RESPONSE = ("wm", "ia")


def vgg_like(bias=True):
    """conv -> batch norm -> ReLU(inplace), as in torchvision's vgg_bn and, without bias, resnet."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, bias=bias), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(54, 8), nn.ReLU(inplace=True), nn.Linear(8, 3),
    )  # fmt: skip


def alexnet_like():
    """conv with bias -> ReLU(inplace), and linear -> ReLU(inplace), as in torchvision's alexnet and vgg."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(inplace=True), nn.Linear(8, 3),
    )  # fmt: skip


def bias_free():
    """conv without bias -> in-place activations of several kinds, directly or after modules that make no copy."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 1, bias=False), nn.Identity(),
        nn.LeakyReLU(inplace=True), nn.Conv2d(6, 2, 3, bias=False), nn.Flatten(), nn.SiLU(inplace=True),
        nn.Linear(32, 8, bias=False), nn.ELU(inplace=True), nn.Linear(8, 3, bias=False),
    )  # fmt: skip


def one_activation():
    """A single activation object after every layer, first after a layer with a bias."""
    activation = nn.ReLU(inplace=True)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), activation, nn.Conv2d(4, 6, 3, bias=False), activation,
        nn.Flatten(), nn.Linear(96, 3),
    )  # fmt: skip


MODELS = {
    "vgg": vgg_like,
    "vgg_no_bias": lambda: vgg_like(bias=False),
    "alexnet": alexnet_like,
    "bias_free": bias_free,
    "one_activation": one_activation,
}


def converted(name, rule, dtype=torch.float64):
    torch.manual_seed(0)
    model, report = pyfeedback.convert(MODELS[name]().to(dtype), RULES[rule], return_report=True)
    return model, report, torch.randn(4, 2, 6, 6, dtype=dtype)


def gradients(model, total):
    model.zero_grad(set_to_none=True)
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def reference_output(model, x):
    """The output of a Sequential with the layers of pyfeedback.reference, and the sum of their penalties."""
    penalties = x.new_zeros(())
    for module in model:
        if getattr(module, "feedback", None) is None:
            x = module(x)
            continue
        rule = module.rule
        terms = {name: getattr(rule, name) for name in ("decay", "amp", "null", "sparse", "self_", "tie", "center")}
        if isinstance(module, nn.Linear):
            x, penalty = reference.linear(x, module.weight, module.feedback, module.bias, **terms)
        else:
            window = (module.stride, module.padding, module.dilation, module.groups)
            x, penalty = reference.conv2d(x, module.weight, module.feedback, module.bias, *window, **terms)
        penalties = penalties + penalty
    return x, penalties


# In-place activations


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_converted_model_are_the_reference(name, rule):
    model, _, x = converted(name, rule)
    twin = copy.deepcopy(model)
    for module in twin:
        if hasattr(module, "inplace"):
            module.inplace = False
    output, penalties = reference_output(twin, x)
    target = torch.randn(output.shape, dtype=output.dtype)
    expected = gradients(twin, F.mse_loss(output, target) + penalties)
    found = gradients(model, F.mse_loss(model(x), target))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value is None:
            assert found[key] is None, key
        else:
            assert (found[key] - value).abs().max() <= 1e-10 * value.abs().max().clamp(min=1e-3), key


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("name", "expected"),
    [("vgg", []), ("vgg_no_bias", []), ("alexnet", []), ("bias_free", ["1", "4", "7", "9"]), ("one_activation", ["3"])],
)
def test_activations_that_would_overwrite_a_response_are_replaced_and_reported(name, expected, rule):
    plain = MODELS[name]()
    model, report, _ = converted(name, rule)
    switched = expected if rule in READ_RESPONSE else []
    assert report.not_in_place == switched
    assert ("no longer in place" in str(report)) == bool(switched)
    off = [key for key, m in model.named_modules(remove_duplicate=False) if getattr(m, "inplace", None) is False]
    assert set(switched) <= set(off)
    same = {id(model.get_submodule(key)) for key in switched}
    for key, module in plain.named_modules(remove_duplicate=False):
        if hasattr(module, "inplace") and id(model.get_submodule(key)) not in same:
            assert model.get_submodule(key).inplace, key


def test_a_custom_rule_that_reads_the_response_replaces_them_too():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(inplace=True))
    _, report = pyfeedback.convert(model, Rule(null=1.0, sparse=1.0), return_report=True)
    assert report.not_in_place == ["1"]


def test_a_functional_in_place_call_has_the_gradients_of_one_out_of_place():
    class Functional(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.conv, self.inplace = nn.Conv2d(2, 4, 3, bias=False), inplace

        def forward(self, x):
            return F.relu(self.conv(x), inplace=self.inplace)

    models = [pyfeedback.convert(Functional(inplace), "ia").double() for inplace in (True, False)]
    models[0].load_state_dict(models[1].state_dict())
    x, kept = torch.randn(2, 2, 6, 6, dtype=torch.float64), []
    for model in models:
        y = model(x)
        for _ in range(2):  # the second pass computes the response again
            y.square().sum().backward(retain_graph=True)
        kept.append([p.grad for p in model.parameters()])
    for found, expected in zip(*kept, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_transport_gives_the_gradients_of_the_original_model(name):
    torch.manual_seed(1)
    plain = MODELS[name]()
    model = pyfeedback.convert(copy.deepcopy(plain), "bp")
    assert list(model.state_dict()) == list(plain.state_dict())
    x, target = torch.randn(4, 2, 6, 6), torch.randn(4, 3)
    found, expected = (gradients(m, F.mse_loss(m(x), target)) for m in (model, plain))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# What conversion keeps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_everything_but_the_feedback_is_kept(train, dtype):
    torch.manual_seed(3)
    model = vgg_like().to(dtype).to(memory_format=torch.channels_last).train(train)
    modules = list(model.named_modules())
    before = {name: (t, t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    x = torch.randn(4, 2, 6, 6, dtype=dtype, requires_grad=True)
    expected = copy.deepcopy(model)(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))

    assert pyfeedback.convert(model, "ia") is model
    assert [(name, id(m)) for name, m in model.named_modules()] == [(name, id(m)) for name, m in modules]
    assert [m.training for m in model.modules()] == [train] * len(modules)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    for name, (tensor, value) in before.items():
        assert after[name] is tensor, name
        assert torch.equal(tensor, value), name
    assert after.keys() - before.keys() == {f"{i}.feedback" for i in (0, 4, 8, 10)}
    for layer in (model[0], model[4], model[8], model[10]):
        assert layer.feedback.dtype is dtype
        assert layer.feedback.device == layer.weight.device
        assert layer.feedback.stride() == layer.weight.stride()
    y = model(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert calls == ["forward", "backward"]
    optimizer.step()
    assert not torch.equal(model[0].weight, before["0.weight"][1])


def test_the_meta_device_is_kept():
    with torch.device("meta"):
        model = alexnet_like()
    pyfeedback.convert(model, "ia")
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_single_layer_is_a_model(kind):
    layer = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect") if kind == "conv" else nn.Linear(2, 4)
    model, report = pyfeedback.convert(layer, "ia", return_report=True)
    assert model is layer
    assert type(layer) is (pyfeedback.nn.Conv2d if kind == "conv" else pyfeedback.nn.Linear)
    assert report.changed == [""]
    assert layer.rule == pyfeedback.rule("ia")


def test_a_shared_layer_is_converted_once():
    layer = nn.Linear(4, 4)
    model, report = pyfeedback.convert(nn.Sequential(layer, nn.Tanh(), layer), "ia", return_report=True)
    assert model[0] is model[2] is layer
    assert report.changed == ["0"]
    assert len(list(pyfeedback.feedback_parameters(model))) == 1


def test_layers_keep_sharing_a_weight():
    model = perceptron(4, 4, 4)
    model[2].weight = model[0].weight
    _, report = pyfeedback.convert(model, "ia", return_report=True)
    assert model[2].weight is model[0].weight
    assert report.changed == ["0", "2"]
    assert model[0].feedback is not model[2].feedback


# Skipped layers and the report


class OwnForward(nn.Conv2d):
    """A subclass whose forward hides the weight."""

    def forward(self, x):
        return F.conv2d(x, next(self.parameters()), self.bias)


def test_layers_without_a_counterpart_are_skipped_and_reported():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2, kdim=6),
            "own": OwnForward(2, 2, 3),
            "embedding": nn.Embedding(5, 8),
            "lazy": nn.LazyLinear(3),
            "bilinear": nn.Bilinear(2, 2, 3),
            "normalized": nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
            "norm": nn.BatchNorm2d(2),
            "linear": nn.Linear(8, 3),
        }
    )
    types = {name: type(m) for name, m in model.named_modules() if name != "linear"}
    _, report = pyfeedback.convert(model, "ia", return_report=True)
    assert report.changed == ["linear"]
    assert list(report.left) == [
        "attention", "attention.out_proj", "own", "embedding", "lazy", "bilinear", "normalized"
    ]  # fmt: skip
    assert "OwnForward" in report.left["own"]
    assert "left attention.out_proj: its attention reads the weight without calling it" in str(report)
    assert {name: type(m) for name, m in model.named_modules() if name != "linear"} == types


def test_the_report_counts_names_and_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="pyfeedback"):
        _, report = pyfeedback.convert(bias_free(), "ia", return_report=True)
    assert str(report) == (
        "5 layers follow ia(decay=0.002, amp=0.002, null=0.002, center=True): 0, 2, 5, 8, 10\n"
        "no longer in place, the rule reads their input: 1, 4, 7, 9"
    )
    assert caplog.messages == [str(report)]


def test_an_unknown_rule_changes_nothing():
    model = alexnet_like()
    with pytest.raises(ValueError, match="rule is 'dfb'"):
        pyfeedback.convert(model, "dfb")
    assert not list(pyfeedback.feedback_layers(model))


# The initial feedback


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(30, 60, 3), lambda: nn.Linear(200, 100)], ids=["conv", "linear"])
def test_feedback_is_normal_with_the_deviation_of_the_weight(make, scale):
    torch.manual_seed(5)
    layer = make()
    nn.init.normal_(layer.weight, std=scale)
    pyfeedback.convert(layer, "fa")
    drawn = layer.feedback.detach() / scale
    assert drawn.std() == pytest.approx(1, rel=0.03)
    assert abs(drawn.mean()) < 0.03
    assert (drawn.abs() < 1).double().mean() == pytest.approx(math.erf(0.5**0.5), abs=0.02)  # normal, not uniform
    assert abs(pyfeedback.metrics.angle(layer.feedback, layer.weight) - 90) < 3


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_constant_weight_gets_a_feedback_too(value):
    layer = nn.Linear(20, 10)
    nn.init.constant_(layer.weight, value)
    pyfeedback.convert(layer, "ia")
    assert layer.feedback.isfinite().all()
    assert layer.feedback.detach().std() > 0.01


def test_a_weight_of_one_number_gets_a_finite_feedback():
    layer = pyfeedback.convert(nn.Linear(1, 1), "ia")
    assert layer.feedback.isfinite().all()
    assert layer.feedback.abs().item() > 0


def test_the_draw_follows_the_seed():
    """Every rank of a distributed run must draw the same feedback."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(6)
        drawn.append([p.detach() for p in pyfeedback.feedback_parameters(pyfeedback.convert(alexnet_like(), "ia"))])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


# Repeated conversion, and the parameters


@pytest.mark.parametrize("second", ["bp", "fa", "ia"])
@pytest.mark.parametrize("first", ["bp", "fa", "ia"])
def test_converting_again_gives_the_new_rule_and_a_fresh_feedback(first, second):
    torch.manual_seed(7)
    model = pyfeedback.convert(alexnet_like(), first)
    weights = [p for name, p in model.named_parameters() if "feedback" not in name]
    old = [layer.feedback for layer in (model[0], model[6])]
    model, report = pyfeedback.convert(model, second, return_report=True)
    assert report.changed == ["0", "2", "6", "8"]
    assert report.left == {}
    assert all(a is b for a, b in zip(weights, pyfeedback.forward_parameters(model), strict=True))
    for layer, before in zip((model[0], model[6]), old, strict=True):
        assert layer.rule == pyfeedback.rule(second)
        if second == "bp":
            assert layer.feedback is None
        else:
            assert layer.feedback.requires_grad == (second == "ia")
            assert before is None or not torch.equal(layer.feedback, before)


@pytest.mark.parametrize("rule", ["bp", "fa", "ia"])
def test_the_parameters_fall_in_two(rule):
    layer = nn.Linear(3, 3)
    model = nn.Sequential(alexnet_like(), layer, nn.Tanh(), layer, nn.BatchNorm1d(3))
    weights = {id(p) for p in model.parameters()}
    pyfeedback.convert(model, rule)
    feedback, forward = list(pyfeedback.feedback_parameters(model)), list(pyfeedback.forward_parameters(model))
    assert {id(p) for p in forward} == weights
    assert len(forward) == len(weights)
    assert {id(p) for p in feedback} == {id(p) for p in model.parameters()} - weights
    assert len(feedback) == (0 if rule == "bp" else 5)
    assert [name for name, _ in pyfeedback.feedback_layers(model)] == (
        [] if rule == "bp" else ["0.0", "0.2", "0.6", "0.8", "1"]
    )


def test_rules_may_differ_between_parts_of_a_model():
    model = alexnet_like()
    pyfeedback.convert(model[:4], "ia")
    pyfeedback.convert(model[6:], "kp")
    assert [layer.rule.name for _, layer in pyfeedback.feedback_layers(model)] == ["ia", "ia", "kp", "kp"]


# unconvert


@pytest.mark.parametrize("rule", ["bp", "fa", "ia"])
def test_unconvert_gives_the_plain_model_with_the_trained_weights(rule):
    torch.manual_seed(0)
    plain, model = alexnet_like(), alexnet_like()
    model.load_state_dict(plain.state_dict())
    modules = list(model.modules())
    assert pyfeedback.unconvert(pyfeedback.convert(model, rule)) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    plain.load_state_dict(model.state_dict())
    assert repr(model).replace(", inplace=True", "") == repr(plain).replace(", inplace=True", "")
    assert not [name for module in model.modules() for name in vars(module) if "feedback" in name or name == "rule"]


def test_an_unconverted_model_is_exported_without_the_package():
    model = pyfeedback.unconvert(pyfeedback.convert(alexnet_like(), "aa")).eval()
    x = torch.randn(3, 2, 8, 8)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))
    assert "pyfeedback" not in str(exported.graph)


def test_under_hooks_of_saved_tensors_the_response_is_one_of_them():
    """Checkpointing and offloading then decide about it."""
    layer = pyfeedback.convert(nn.Linear(64, 32, bias=False), "ia")  # smaller ones compute it again
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        layer(torch.randn(64, 64))
    assert seen[-1] == (64, 32)
