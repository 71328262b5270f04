"""Product feedback alignment, B = P R: R.grad = P' (tie dL/dW) + decay R."""

import pytest
import torch
from cases import largest_error
from rule_networks import batch, gradients, network
from torch.nn import functional as F

import pyfeedback
from pyfeedback import Rule, reference
from pyfeedback.optim import SGD, AdamW, FeedbackSGD


@pytest.mark.parametrize("expansion", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_product_against_autograd(expansion, groups):
    torch.manual_seed(0)
    rule = Rule(tie=0.7, decay=0.2, expansion=expansion)
    layer = pyfeedback.nn.Conv2d(4, 6, 3, groups=groups, rule=rule, dtype=torch.float64)
    assert layer.feedback.shape == (6 * expansion, 4 // groups, 3, 3)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    leaf, factor = x.detach().requires_grad_(), layer.feedback.detach().clone().requires_grad_()
    weight = layer.weight.detach().requires_grad_()
    product = torch.einsum("km,mcrs->kcrs", layer.mixing, factor)
    output, _ = reference.conv2d(leaf, weight, product, layer.bias, groups=groups, tie=0.7)
    (output.square().sum() + 0.1 * factor.square().sum()).backward()
    found = [x.grad, layer.weight.grad, layer.feedback.grad]
    assert largest_error(found, [leaf.grad, weight.grad, factor.grad]) < 1e-12


@pytest.mark.parametrize("optimizer", [FeedbackSGD, SGD, AdamW])
def test_optimizers_step_the_factor_as_autograd_would(optimizer):
    """The optimizer computes the gradient of the factor from that of the weight, in place of autograd."""
    ours, plain = network("pfa"), network("pfa")
    plain.load_state_dict(ours.state_dict())
    step = optimizer(ours, lr=0.1)
    gradients(plain), gradients(ours)
    assert ours[3].feedback.grad is None
    step.step()
    with torch.no_grad():
        for mine, theirs in zip(
            pyfeedback.feedback_parameters(ours), pyfeedback.feedback_parameters(plain), strict=True
        ):
            if optimizer is AdamW:  # decoupled weight decay
                pulled = theirs.grad - 2e-3 * theirs
                expected = theirs * (1 - 0.1 * 2e-3) - 0.1 * pulled / (pulled.abs() + 1e-8)
            else:
                expected = theirs - 0.1 * theirs.grad
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_the_product_converges_to_the_weight():
    """Both decay at the same rate and take the same steps: Kolen-Pollack through a random matrix."""
    torch.manual_seed(0)
    layer = pyfeedback.nn.Linear(20, 15, rule=pyfeedback.rule("pfa", decay=0.1, expansion=8))
    optimizer = SGD(layer, lr=0.1, weight_decay=0.1)
    angles = []
    for _ in range(400):
        x = torch.randn(16, 20)
        optimizer.zero_grad()
        F.mse_loss(layer(x), x[:, :15]).backward()
        optimizer.step()
        angles.append(pyfeedback.alignment(layer)[""].angle)
    assert angles[0] > 80
    assert angles[-1] < 25


def test_product_under_torch_func():
    model = network("pfa")
    x, target = batch()
    parameters = dict(model.named_parameters())

    def loss(parameters, x, target):
        return F.mse_loss(torch.func.functional_call(model, parameters, (x[None],)), target[None])

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, target)
    for i in range(len(x)):
        expected = torch.autograd.grad(loss(parameters, x[i], target[i]), list(parameters.values()))
        assert largest_error([grads[i] for grads in found.values()], list(expected)) < 1e-12


def test_product_checkpoints():
    model = network("pfa")
    again = network("fa")
    pyfeedback.convert(again, "pfa")
    again.load_state_dict(model.state_dict())
    assert largest_error(gradients(again), gradients(model)) == 0
    assert not [name for name in pyfeedback.unconvert(model).state_dict() if "feedback" in name or "mixing" in name]
