"""A small converted network in float64, a batch for it, and its gradients, for the tests of single rules."""

from small_networks import convnet, regression
from torch import Tensor, nn
from torch.nn import functional as F

import pyfeedback


def network(rule, **options) -> nn.Sequential:
    """A convolution, "0", and linear layers, "3" and "5", that follow the rule. Seeds torch's global generator."""
    return pyfeedback.convert(convnet(6, 5, 7).double(), rule, **options)


def batch() -> list[Tensor]:
    """Images [4, 2, 5, 5] and targets [4, 3], the same in each call."""
    return regression(count=4, side=5)


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradients of one pass over :func:`batch`, of the parameters that have one."""
    model.zero_grad()
    x, target = batch()
    F.mse_loss(model(x), target).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]
