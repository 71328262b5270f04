"""How many Python functions of the package a layer calls: few enough to read, and cheap for a tiny layer."""

import pytest
import torch

from pyfeedback import nn
from pyfeedback.testing import python_calls

MOST = {
    "fa": (8, 1),
    "kp": (12, 16),
    "sa": (12, 16),
    "wm": (12, 17),
    "ia": (12, 17),
    "aa": (12, 16),
}  # of a convolution


@pytest.mark.parametrize("rule", MOST)
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_a_layer_calls_few_functions(kind, rule):
    """In the second passes: the first ones choose the algorithm."""
    layer = nn.Linear(6, 5, rule=rule) if kind == "linear" else nn.Conv2d(6, 5, 3, bias=False, rule=rule)
    x = torch.randn(*(3, 6) if kind == "linear" else (2, 6, 7, 7), requires_grad=True)
    layer(x).sum().backward()
    outputs = []
    forward = python_calls(lambda: outputs.append(layer(x)))
    gradient = torch.ones_like(outputs[0])
    backward = python_calls(lambda: outputs[0].backward(gradient))
    assert forward[0].startswith("nn/")
    assert len(forward) <= MOST[rule][0], forward
    if rule == "fa":  # PyTorch's own backward, with B in place of W
        assert backward == ["ops/autograd.py unpack"]
        return
    assert "backends/composite/layer.py backward" in backward
    assert len(backward) <= MOST[rule][1] + 2 * (kind == "linear"), backward  # dx and dW are two calls there
