"""Rules with a time constant: normalized data terms, targets, and the steps of the optimizers."""

import math

import pytest
import torch
from torch import nn

import pyfeedback
from pyfeedback import Rule, functional, reference, schedules

TERMS = {
    "wm": {"amp": 1.0, "decay": 1.0},
    "ia": {"amp": 2.0, "null": 1.0, "decay": 1.0},
    "aa": {"amp": 1.0, "sparse": 1.0},
    "aa, another ratio": {"amp": 2.0, "sparse": 0.5},
    "all": {"amp": 2.0, "null": 1.0, "sparse": 0.5, "self_": 0.3, "decay": 0.1},
}
LAYERS = {  # input, weight, arguments of the convolution; None: a linear layer
    "conv": ((9, 6, 7, 8), (4, 6, 3, 3), {"stride": 2, "padding": 1}),
    "grouped": ((9, 6, 7, 8), (4, 3, 3, 2), {"groups": 2, "padding": (1, 0)}),
    "pointwise": ((9, 6, 7, 8), (4, 6, 1, 1), {}),
    "wide pointwise": ((9, 6, 7, 8), (16, 6, 1, 1), {"stride": 2}),
    "transposed": ((9, 6, 5, 4), (6, 4, 3, 3), {"stride": 2, "transposed": True}),
    "conv1d": ((9, 6, 11), (4, 6, 3), {"dilation": 2}),
    "linear": ((9, 6), (5, 6), None),
    "tokens": ((9, 4, 6), (16, 6), None),
}


def rule_gradient(module, kind, x, weight, feedback, **rule):
    _, _, arguments = LAYERS[kind]
    feedback = feedback.clone().requires_grad_()
    names = {functional: ("fa_linear", "fa_convolution"), reference: ("linear", "convolution")}[module]
    layer = getattr(module, names[arguments is not None])
    result = layer(x, weight, feedback, None, **(arguments or {}), **rule)
    (result.sum() if module is functional else result[1]).backward()
    return feedback.grad


def operands(kind, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    input, weight, _ = LAYERS[kind]
    x = torch.rand(input, generator=generator, dtype=torch.float64)  # not centered, like activations
    draws = (torch.randn(weight, generator=generator, dtype=torch.float64) for _ in range(2))
    return [t.to(dtype) for t in (x, *draws)]


@pytest.mark.parametrize("samples", [0, 5])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_normalized_gradient_is_that_of_the_reference(kind, terms, center, samples):
    tensors, rule = operands(kind), {**TERMS[terms], "center": center, "samples": samples, "normalize": True}
    expected = rule_gradient(reference, kind, *tensors, **rule)
    torch.testing.assert_close(rule_gradient(functional, kind, *tensors, **rule), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", ["wm", "ia", "aa"])
@pytest.mark.parametrize("kind", ["conv", "pointwise", "wide pointwise", "tokens"])
def test_a_normalized_gradient_in_other_dtypes(kind, terms, dtype):
    """Within a few roundings of the reference, which computes in float64 from the rounded operands."""
    tensors, rule = operands(kind, dtype), {**TERMS[terms], "normalize": True}
    expected = rule_gradient(reference, kind, *(t.double() for t in tensors), **rule)
    error = (rule_gradient(functional, kind, *tensors, **rule).double() - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("terms", ["wm", "ia", "aa"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_size_of_the_input_does_not_matter(kind, terms):
    x, *kernels = operands(kind)
    rule = {**TERMS[terms], "normalize": True}
    expected = rule_gradient(functional, kind, x, *kernels, **rule)
    torch.testing.assert_close(rule_gradient(functional, kind, 1000 * x, *kernels, **rule), expected)


@pytest.mark.parametrize("terms", ["wm", "ia", "aa"])
def test_nothing_read_gives_no_data_terms(terms):
    x, weight, feedback = operands("conv")
    rule = {**TERMS[terms], "normalize": True}
    found = rule_gradient(functional, "conv", torch.zeros_like(x), weight, feedback, **rule)
    torch.testing.assert_close(found, rule.get("decay", 0.0) * feedback)


def test_a_backend_that_does_not_normalize_leaves_it_to_the_composition():
    """The compiled depthwise backward computes the same rule without it."""
    torch.manual_seed(0)
    x, weight = torch.rand(4, 8, 9, 9), torch.randn(8, 1, 3, 3)
    found = {}
    for backend in ("auto", "composite"):
        feedback = torch.ones_like(weight, requires_grad=True)
        with pyfeedback.backend(backend):
            functional.fa_conv2d(x, weight, feedback, groups=8, amp=1.0, normalize=True).sum().backward()
        found[backend] = feedback.grad
    torch.testing.assert_close(found["auto"], found["composite"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "terms"),
    [
        (pyfeedback.rule("wm", tau=20), {"amp": 1.0, "decay": 1.0}),
        (pyfeedback.rule("wm", tau=20, ratio=0.5), {"amp": 0.5, "decay": 1.0}),
        (pyfeedback.rule("ia", tau=20), {"amp": 2.0, "null": 1.0, "decay": 1.0}),
        (pyfeedback.rule("ia", tau=20, nu=0.5, ratio=2.0), {"amp": 3.0, "null": 0.5, "decay": 1.0}),
        (pyfeedback.rule("sa", tau=20, ratio=3.0), {"self_": 3.0, "decay": 1.0}),
        (pyfeedback.rule("aa", tau=20), {"amp": 1.0, "sparse": 1.0}),
    ],
    ids=str,
)
def test_a_time_constant_replaces_the_coefficients(given, terms):
    found = given.coefficients(batch=8, positions=25)
    assert {
        name: value for name, value in found._asdict().items() if value and name not in ("center", "normalize")
    } == {**terms}
    assert found.normalize == ("self_" not in terms)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau": -1.0}, "tau is -1.0, expected a finite number above 0"),
        ({"tau": 0.5}, "tau is 0.5 and nu 1.0, expected a tau of 1 or more"),
        ({"tau": 5, "nu": -1.0}, "tau is 5 and nu -1.0, expected a tau of 1 or more and a nu of 0 or more"),
        ({"tau": 5, "ratio": 0.0}, "ratio is 0.0, expected a finite number above 0"),
        ({"tau": 5, "self_": 1.0}, "expected the terms of wm, ia, sa, aa or kp, reduction batch and no expansion"),
        ({"tau": 5, "reduction": "mean"}, "expected the terms of wm, ia, sa, aa or kp, reduction batch"),
        ({"source": "noise"}, "source is 'noise', expected one of data, probes"),
        ({"source": "probes", "samples": 4}, "expected amp, null or sparse, and no samples or tie"),
        ({"probes": 5}, "expected source='probes'"),
        ({"source": "probes", "probes": -1}, "probes is -1, expected 0 or more"),
        ({"source": "probes", "probes": math.inf}, "probes is inf, expected an int of 0 or more, or a finite float"),
        ({"source": "probes", "every": 0}, "every is 0, expected 1 or more"),
    ],
    ids=str,
)
def test_an_invalid_field_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        pyfeedback.rule("ia", **changes)
    assert "\n" not in str(error.value)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))


def converted(rule):
    return pyfeedback.convert(network(), rule, init=pyfeedback.Init(seed=1))


def step(model, optimizer, seed=0):
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


OPTIMIZERS = {
    "FeedbackSGD": lambda model: pyfeedback.optim.FeedbackSGD(model, lr=0.7, momentum=0.9),
    "SGD": lambda model: pyfeedback.optim.SGD(model, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=0.1),
    "AdamW": lambda model: pyfeedback.optim.AdamW(model, lr=1e-3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["wm", "ia", "sa", "aa"])
def test_a_step_is_a_fraction_of_the_way_whatever_the_optimizer(name, optimizer):
    """B moves by 1 / tau along the rule's gradient, which the ops compute for the W of before the step."""
    model = converted(pyfeedback.rule(name, tau=8.0))
    stepped = OPTIMIZERS[optimizer](model)
    layers = dict(pyfeedback.feedback_layers(model))
    inputs = {}
    for layer in layers.values():
        layer.register_forward_pre_hook(lambda layer, x: inputs.update({layer: x[0].detach()}))
    before = {layer: (layer.weight.detach().clone(), layer.feedback.detach().clone()) for layer in layers.values()}
    step(model, stepped)
    for layer, (weight, feedback) in before.items():
        gradient = feedback.clone().requires_grad_()
        op = functional.fa_linear if isinstance(layer, nn.Linear) else functional.fa_conv2d
        op(inputs[layer], weight, gradient, **layer.rule.coefficients(4, 1)._asdict()).sum().backward()
        expected = feedback - gradient.grad / 8.0
        torch.testing.assert_close(layer.feedback.detach(), expected, rtol=1e-5, atol=1e-6)


def test_symmetric_alignment_relaxes_to_the_ratio():
    """B - ratio W decays by 1 - 1 / tau a step, if W does not change."""
    model = converted(pyfeedback.rule("sa", tau=5.0, ratio=0.5))
    optimizer = pyfeedback.optim.FeedbackSGD(model, lr=123.0)
    layer = model[0]
    start = layer.feedback.detach() - 0.5 * layer.weight.detach()
    for _ in range(7):
        optimizer.step()
    distance = layer.feedback.detach() - 0.5 * layer.weight.detach()
    torch.testing.assert_close(distance, start * 0.8**7, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "factor"),
    [
        (lambda model: pyfeedback.optim.SGD(model, lr=0.05), lambda steps: (1 - 1 / 40) ** steps),
        (lambda model: pyfeedback.optim.AdamW(model, lr=1e-3), lambda steps: (1 - 1 / 40) ** steps),
    ],
    ids=["SGD", "AdamW"],
)
def test_kolen_pollack_forgets_in_tau_steps(build, factor):
    model = converted(pyfeedback.rule("kp", tau=40.0))
    optimizer = build(model)
    layer = model[0]
    start = (layer.weight - layer.feedback).detach()
    for seed in range(30):
        step(model, optimizer, seed)
    torch.testing.assert_close((layer.weight - layer.feedback).detach(), start * factor(30), rtol=1e-4, atol=1e-6)


def test_kolen_pollack_decays_by_the_full_learning_rate():
    """A scheduler changes the learning rate, and not the decay of the weights."""
    model = converted(pyfeedback.rule("kp", tau=40.0))
    optimizer = pyfeedback.optim.SGD(model, lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    for group in optimizer.param_groups:
        assert optimizer._tied_decay(model[0].rule, group) == pytest.approx(0.1 / (0.05 * 40))
    assert scheduler.get_last_lr()[0] == pytest.approx(0.005)


def test_kolen_pollack_with_a_time_constant_needs_the_optimizer_of_w():
    with pytest.raises(ValueError, match=r"kp with a tau, expected SGD or AdamW of pyfeedback\.optim"):
        pyfeedback.optim.FeedbackSGD(converted(pyfeedback.rule("kp", tau=40.0)), lr=0.1)


def test_a_schedule_changes_the_time_constant_and_the_strength():
    model = converted(pyfeedback.rule("ia", tau=10.0))
    schedule = schedules.Schedule(model, tau=schedules.linear(1.0, 3.0, 2), nu=lambda step: 0.5)
    assert (model[0].rule.tau, model[0].rule.null, model[0].rule.amp) == (10.0, 0.5, 1.5)
    schedule.step()
    assert model[0].rule.tau == 20.0


@pytest.mark.parametrize(("rule", "curve"), [(pyfeedback.rule("ia", tau=10.0), "amp"), (pyfeedback.rule("ia"), "tau")])
def test_a_schedule_without_effect_is_refused(rule, curve):
    with pytest.raises(ValueError, match=f"{curve} has no effect on ia"):
        schedules.Schedule(converted(rule), **{curve: schedules.constant(1.0)})


def test_time_constants_of_a_model():
    rules = {"0": pyfeedback.rule("sa", tau=12.0), "3": pyfeedback.rule("wm", decay=0.02)}
    optimizer = pyfeedback.optim.SGD(converted(rules), lr=0.05, momentum=0.9)
    assert optimizer.time_constants() == {"0": 12.0, "3": pytest.approx(0.1 / (0.05 * 0.02))}
    still = pyfeedback.optim.SGD(converted(pyfeedback.rule("wm", decay=0.0)), lr=0.05)
    assert still.time_constants() == {"0": math.inf, "3": math.inf}
    assert all(math.isnan(tau) for tau in pyfeedback.optim.AdamW(converted("sa")).time_constants().values())


@pytest.mark.parametrize(
    ("rule", "total_steps", "warned"),
    [
        (pyfeedback.rule("sa", tau=20.0), 1000, False),
        (pyfeedback.rule("sa", tau=31.0), 1000, True),
        (pyfeedback.rule("sa", tau=31.0), None, False),
        (pyfeedback.rule("kp", tau=200.0), 1000, False),
        (pyfeedback.rule("kp", tau=1001.0), 1000, True),
        (pyfeedback.rule("wm", decay=0.0), None, True),
        (pyfeedback.rule("oja"), 1000, False),
        (pyfeedback.rule("fa"), 1000, False),
    ],
    ids=str,
)
def test_a_feedback_that_cannot_find_w_in_the_run_is_reported(rule, total_steps, warned, caplog):
    pyfeedback.optim.SGD(converted(rule), lr=0.05, momentum=0.9, total_steps=total_steps)
    assert [r.levelname for r in caplog.records if "will not find W" in r.message] == ["WARNING"] * warned


def test_the_loss_scale_does_not_change_the_step():
    """B's own gradient is not scaled, and neither is its step."""
    found = []
    for scale in (1.0, 2.0**12):
        model = converted(pyfeedback.rule("ia", tau=8.0))
        optimizer = pyfeedback.optim.SGD(model, lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        found.append(model[0].feedback.detach().clone())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["wm", "ia", "aa"])
def test_a_compiled_layer_follows_the_same_rule(name):
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = converted(pyfeedback.rule(name, tau=8.0))
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = pyfeedback.optim.SGD(model, lr=0.01)
        for seed in range(2):
            optimizer.zero_grad()
            run(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()
        found.append(model[0].feedback.detach().clone())
    torch.testing.assert_close(*found)


def test_a_rule_with_a_time_constant_is_a_rule():
    """It can be changed, printed and compared like any other."""
    rule = pyfeedback.rule("ia", tau=20, nu=0.5)
    assert pyfeedback.rule(rule, tau=10).tau == 10
    assert pyfeedback.rule(rule) == rule == Rule(amp=1.0, null=1.0, decay=1.0, center=True, tau=20, nu=0.5)
    assert "tau=20" in str(rule)


def test_kp_without_an_optimizer_of_the_package_is_reported_once(caplog):
    for tau, reported in ((20.0, 1), (0.0, 0)):
        model = pyfeedback.convert(nn.Linear(4, 3), pyfeedback.rule("kp", tau=tau))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
        found = [r.message for r in caplog.records if "does not learn: its rule makes W and B decay" in r.message]
        assert len(found) == reported
        caplog.clear()
    model = pyfeedback.convert(nn.Linear(4, 3), pyfeedback.rule("kp", tau=20.0))
    optimizer = pyfeedback.optim.AdamW(model, lr=0.1)
    for _ in range(3):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    assert not caplog.records
