"""Sign-symmetry, B = M sign(W): usf, frsf and brsf."""

import pytest
import torch
from torch import nn

import pyfeedback
from pyfeedback import Init, reference

SIGNED = ("usf", "frsf", "brsf")


@pytest.mark.parametrize("rule", SIGNED)
def test_input_gradient_has_the_signs_of_the_weight(rule):
    torch.manual_seed(0)
    layer = pyfeedback.nn.Conv2d(3, 4, 3, padding=1, rule=rule, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    grad_output = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.neg_()  # the signs are read in the forward pass
    torch.manual_seed(2)
    layer(x).backward(grad_output)
    torch.manual_seed(2)
    magnitude = layer.feedback.abs()
    if rule == "brsf":
        magnitude = magnitude * torch.randn_like(magnitude).abs()
    leaf = x.detach().requires_grad_()
    output, _ = reference.conv2d(leaf, layer.weight.detach(), magnitude * layer.weight.sign(), layer.bias, padding=1)
    output.backward(grad_output)
    torch.testing.assert_close(x.grad, leaf.grad)
    assert layer.feedback.grad is None


def test_magnitudes():
    drawn = pyfeedback.nn.Linear(40, 30, rule="fa", init=Init(seed=3))
    uniform = pyfeedback.nn.Linear(40, 30, rule="usf", init=Init(seed=3))
    fixed = pyfeedback.nn.Linear(40, 30, rule="frsf", init=Init(seed=3))
    torch.testing.assert_close(uniform.feedback, drawn.feedback.square().mean().sqrt().expand(30, 40))
    assert torch.equal(fixed.feedback, drawn.feedback)
    assert torch.equal(fixed.effective_feedback(), drawn.feedback.abs() * fixed.weight.sign())
    assert fixed.effective_feedback() is not fixed.feedback


def test_batch_random_magnitudes_are_drawn_only_in_passes_with_gradients():
    layer = pyfeedback.nn.Linear(40, 30, rule="brsf")
    first, second = layer.effective_feedback(), layer.effective_feedback()
    assert not torch.equal(first, second)
    assert torch.equal(first.sign(), second.sign())
    assert first.square().mean().sqrt() == pytest.approx(float(layer.feedback[0, 0]), rel=0.1)
    state = torch.get_rng_state()
    with torch.no_grad():
        layer(torch.randn(2, 40, generator=torch.Generator().manual_seed(0)))
    pyfeedback.alignment(layer)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rule", SIGNED)
def test_signs_align(rule):
    """The cosine between sign(W) and a normal W is sqrt(2 / pi); with independent magnitudes it is 2 / pi."""
    torch.manual_seed(0)
    layer = nn.Linear(300, 200)
    nn.init.normal_(layer.weight)
    pyfeedback.convert(layer, rule)
    expected = {"usf": 37.07, "frsf": 50.46, "brsf": 37.07}[rule]
    assert pyfeedback.alignment(layer)[""].angle == pytest.approx(expected, abs=0.5)
