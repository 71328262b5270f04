"""How many Python functions of the package a layer calls: few enough to read, and cheap for a tiny layer."""

import pytest
import torch

import pyfeedback
from pyfeedback import nn
from pyfeedback.testing import python_calls

MOST = {"fa": (4, 1), "kp": (4, 15), "sa": (4, 15), "wm": (4, 5), "ia": (4, 5), "aa": (4, 5)}  # of a convolution
MOST_OF_LARGE = {"wm": (4, 16), "ia": (4, 16), "aa": (4, 15)}  # which is composed of PyTorch's kernels


def calls_of(layer, x):
    """The functions that the second forward and backward pass call: the first ones choose the algorithm."""
    layer(x).sum().backward()
    outputs = []
    forward = python_calls(lambda: outputs.append(layer(x)))
    gradient = torch.ones_like(outputs[0])
    return forward, python_calls(lambda: outputs[0].backward(gradient))


@pytest.mark.parametrize("rule", MOST)
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_a_layer_calls_few_functions(kind, rule):
    if rule in MOST_OF_LARGE and not pyfeedback.build_info().cpu:
        pytest.skip("the CPU library is not built")
    layer = nn.Linear(6, 5, rule=rule) if kind == "linear" else nn.Conv2d(6, 5, 3, bias=False, rule=rule)
    forward, backward = calls_of(layer, torch.randn(*(3, 6) if kind == "linear" else (2, 6, 7, 7), requires_grad=True))
    assert forward[0].startswith("nn/")
    assert len(forward) <= MOST[rule][0], forward
    if rule == "fa":  # PyTorch's own backward, with B in place of W
        assert backward == ["ops/autograd.py unpack"]
        return
    assert f"backends/{'extension/dense' if rule in MOST_OF_LARGE else 'composite/layer'}.py backward" in backward
    composed = kind == "linear" and rule not in MOST_OF_LARGE  # dx and dW are two calls there
    assert len(backward) <= MOST[rule][1] + 2 * composed, backward


@pytest.mark.parametrize("rule", MOST_OF_LARGE)
def test_a_larger_layer_calls_few_functions(rule):
    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    forward, backward = calls_of(nn.Conv2d(16, 16, 3, bias=False, rule=rule), x)
    assert len(forward) <= MOST_OF_LARGE[rule][0], forward
    assert "backends/composite/layer.py backward" in backward
    assert len(backward) <= MOST_OF_LARGE[rule][1], backward
