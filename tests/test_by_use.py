"""Weights that a forward reads, or has of its own: their products have the gradients of the reference."""

import copy

import layer_cases
import pytest
import torch
import use_cases
from torch.func import functional_call

import pyfeedback
from pyfeedback import reference

RULES = {name: layer_cases.RULES[name] for name in ("fa", "ia", "wm", "sa", "aa", "kp")}


def converted(name, rule):
    plain, x = use_cases.build(name)
    model, report = pyfeedback.convert(copy.deepcopy(plain), rule, return_report=True)
    assert report.left == {}
    return plain, model, x, dict(pyfeedback.feedback_layers(model))


def with_feedback(plain, layers):
    """The weights of the plain module, with each replaced by its feedback weight."""
    values = {}
    for name, layer in layers.items():
        owner = name.rpartition(".")[0] if name.endswith("_feedback") else name
        key = f"{owner}.{layer.weight_name}" if owner else layer.weight_name
        values[key] = layer.feedback.detach()
    return dict(plain.named_parameters()) | values


@pytest.mark.parametrize("name", use_cases.ALL)
def test_the_input_gradient_is_that_of_the_feedback_and_the_others_are_true(name):
    plain, model, x, layers = converted(name, "fa")
    inputs = [x.clone().requires_grad_() for _ in range(3)]
    found, true = model(inputs[0]), plain(inputs[1])
    torch.testing.assert_close(found, true)
    grad = layer_cases.output_gradient(found)
    found.backward(grad), true.backward(grad)
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(key).grad, parameter.grad)
    functional_call(plain, with_feedback(plain, layers), (inputs[2],)).backward(grad)
    torch.testing.assert_close(inputs[0].grad, inputs[2].grad)
    assert (inputs[0].grad - inputs[1].grad).norm() > 0.1 * inputs[1].grad.norm()
    assert all(layer.called for layer in layers.values())


@pytest.mark.parametrize("rule", [r for r in RULES if r != "fa"])
@pytest.mark.parametrize("name", use_cases.PRODUCTS)
def test_the_gradient_of_the_feedback_is_that_of_the_rule(name, rule):
    plain, model, x, layers = converted(name, RULES[rule])
    y = model(x)
    y.backward(layer_cases.output_gradient(y))
    (layer,) = layers.values()
    ((key, weight),) = [(k, p.detach()) for k, p in plain.named_parameters() if p.dim() > 1]
    without_bias = {k: torch.zeros_like(p) for k, p in plain.named_parameters()}
    factor = 0.5 if name == "addmm" else 1.0  # of the output, not of the weight

    def conv(x, kernel):
        return functional_call(plain, without_bias | {key: kernel}, (x,)) / factor

    def conv_transposed(y, kernel):
        at = torch.zeros_like(samples, requires_grad=True)
        return torch.autograd.grad(conv(at, kernel), at, y, create_graph=True)[0]

    samples = x if x.dim() > 1 else x.unsqueeze(0)
    feedback = layer.feedback.detach().clone().requires_grad_()
    terms = {term: getattr(RULES[rule], term) for term in ("decay", "amp", "null", "sparse", "self_", "center")}
    reference.regularizer(
        samples, conv(samples, weight), weight, feedback, conv, conv_transposed, **terms
    ).backward()
    expected = feedback.grad + RULES[rule].tie * model.get_parameter(key).grad
    torch.testing.assert_close(layer.feedback.grad, expected)
