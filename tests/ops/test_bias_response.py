"""A centered rule reads the output of a layer with a small bias as its response; with a large one, it is computed."""

import math
from contextlib import nullcontext

import pytest
import torch
from cases import RULES, norm_error, percentile
from torch.nn import functional as F

from pyfeedback import functional, reference
from pyfeedback.backends.extension import dense
from pyfeedback.core.geometry import Convolution, Linear

SIZES = {  # input and weight, large enough that computing the response again takes longer than the comparison
    "linear": ((64, 256), (256, 256)),
    "conv": ((4, 32, 12, 12), (32, 32, 3, 3)),
}
CENTERED = [pytest.param(RULES[name], id=name) for name in ("wm-centered", "ia-centered")]


def tensors(kind, offset, mean=0.0):
    """Input, weight, feedback and a bias that is about ``offset`` times as large as the response."""
    size, of_weight = SIZES[kind]
    x = torch.randn(size).relu_() + mean
    w, b = (torch.randn(of_weight) / math.prod(of_weight[1:]) ** 0.5 for _ in range(2))
    return x, w, b.requires_grad_(), torch.randn(of_weight[0]).sign() * offset


def layer(kind, x, w, b, bias, rule):
    if kind == "linear":
        return functional.fa_linear(x, w, b, bias, **rule)
    return functional.fa_conv2d(x, w, b, bias, padding=1, **rule)


def by_reference(kind, x, w, b, rule, dtype):
    b = b.detach().to(dtype, copy=True).requires_grad_()
    arguments = {} if kind == "linear" else {"padding": 1}
    op = reference.linear if kind == "linear" else reference.conv2d
    op(x.to(dtype), w.to(dtype), b, **arguments, **rule)[1].backward()
    return b.grad


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("rule", CENTERED)
@pytest.mark.parametrize("kind", SIZES)
def test_the_error_is_at_most_twice_pytorchs_whatever_the_bias(kind, rule, mean):
    ratios = []
    for seed in range(40):
        torch.manual_seed(seed)
        x, w, b, bias = tensors(kind, (0.3, 1.0, 3.0, 30.0)[seed % 4] * (1 + mean), mean)
        layer(kind, x, w, b, bias, rule).sum().backward()
        plain, exact = (by_reference(kind, x, w, b, rule, dtype) for dtype in (torch.float32, torch.float64))
        unit = torch.finfo(torch.float32).eps
        ratios.append(max(0.0, norm_error(b.grad, exact) - unit) / max(norm_error(plain, exact), unit / 8))
    assert percentile(ratios, 95) <= 2, sorted(ratios)[-5:]


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize(
    ("change", "products"),
    [
        ({}, 1),
        ({"offset": 30.0}, 2),
        ({"channel": 30.0}, 2),  # one large element of the bias suffices
        ({"center": False}, 2),  # nothing removes the bias
        ({"dtype": torch.bfloat16}, 2),
        ({"batch": 1}, 2),  # too small to compare
        ({"samples": 1}, 2),
        ({"in_place": True}, 2),
        ({"hooks": True}, 2),  # a saved tensor, which an in-place activation would invalidate
    ],
    ids=str,
)
def test_when_the_response_is_computed_again(kind, change, products, monkeypatch):
    torch.manual_seed(0)
    x, w, b, bias = tensors(kind, change.get("offset", 0.01))
    bias[0] = change.get("channel", bias[0])
    x, w, b, bias = (t.detach().to(change.get("dtype", torch.float32)) for t in (x, w, b, bias))
    rule = RULES["wm-centered"] | {name: change[name] for name in ("center", "samples") if name in change}
    monkeypatch.setattr(dense, "MOST_MACS_LINEAR", 0)  # the kernel of a small layer never reads the response
    count, owner = [], Linear if kind == "linear" else Convolution
    fprop = owner.fprop
    monkeypatch.setattr(owner, "fprop", lambda *arguments: count.append(1) or fprop(*arguments))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with hooks if change.get("hooks") else nullcontext():
        output = layer(kind, x[: change.get("batch")], w, b.requires_grad_(), bias, rule)
    (F.relu_(output) if change.get("in_place") else output).sum().backward()
    assert len(count) == products
