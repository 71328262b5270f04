"""Modules after a layer may modify its output in place, as with torch.nn, unless the rule reads the output."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback import Rule

RULES = {
    "fa": Rule(name="fa"),
    "wm": Rule(amp=0.3, decay=0.2, center=True, name="wm"),
    "null": Rule(null=0.2, decay=0.1, name="null"),
    "aa": Rule(amp=0.3, sparse=0.2, name="aa"),
    "kp": Rule(tie=1.0, decay=0.2, name="kp"),
}
WORK = {
    "relu": lambda y: F.relu(y, inplace=True),
    "dropout": lambda y: F.dropout(y, 0.5, True, True),
    "add": lambda y: y.add_(torch.ones_like(y)),
    "slice": lambda y: y[:1].mul_(2).sum() + y.sum(),
}
# The same operations out of place.
APART = {
    "relu": F.relu,
    "dropout": lambda y: F.dropout(y, 0.5, True),
    "add": lambda y: y + torch.ones_like(y),
    "slice": lambda y: (
        (y[:1] * 2).sum()
        + (y * torch.arange(len(y)).clamp(0, 1).view(-1, *[1] * (y.dim() - 1))).sum()
        + 2 * y[:1].sum()
    ),
}
# A torch.nn layer and the shape of an input.
LAYERS = {
    "linear": (nn.Linear(4, 6), (3, 4)),
    "linear-3d": (nn.Linear(4, 6), (3, 5, 4)),
    "linear-4d": (nn.Linear(4, 6), (3, 2, 5, 4)),
    "linear-unbatched": (nn.Linear(4, 6), (4,)),
    "linear-3d-no-bias": (nn.Linear(6, 2, bias=False), (3, 5, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3), (3, 4, 8)),
    "conv1d-unbatched": (nn.Conv1d(4, 6, 3), (4, 8)),
    "conv2d": (nn.Conv2d(4, 6, 3), (3, 4, 6, 6)),
    "conv2d-unbatched": (nn.Conv2d(4, 6, 3), (4, 6, 6)),
    "conv2d-no-bias": (nn.Conv2d(4, 6, 3, bias=False), (3, 4, 6, 6)),
    "conv3d": (nn.Conv3d(4, 6, 2), (3, 4, 4, 4, 4)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3), (3, 4, 8)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3), (3, 4, 6, 6)),
}
AUTOCAST = ("fa", "null")


def converted(name, rule, dtype=torch.float64):
    torch.manual_seed(0)
    plain, shape = LAYERS[name]
    plain = copy.deepcopy(plain).to(dtype)
    layer = pyfeedback.convert(copy.deepcopy(plain), rule)
    return plain, layer, torch.randn(shape, dtype=dtype)


def trained(layer, x, work):
    """Output and gradients of the layer and the operation after it."""
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(1)
    y = work(layer(leaf))
    y.sum().backward()
    return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("name", LAYERS)
def test_in_place_work_has_the_gradients_of_out_of_place_work(name, work, rule):
    _, layer, x = converted(name, RULES[rule])
    for ours, apart in zip(trained(layer, x, WORK[work]), trained(layer, x, APART[work]), strict=True):
        torch.testing.assert_close(ours, apart)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_with_hooks_of_saved_tensors(name):
    _, layer, x = converted(name, RULES["wm"])
    with torch.autograd.graph.save_on_cpu():
        found = trained(layer, x, WORK["relu"])
    for ours, apart in zip(found, trained(layer, x, APART["relu"]), strict=True):
        torch.testing.assert_close(ours, apart)


@pytest.mark.parametrize("name", LAYERS)
def test_the_forward_is_torch_nn_bit_for_bit_and_no_view_of_a_function(name):
    plain, layer, x = converted(name, "fa", torch.float32)
    output = layer(x)
    assert torch.equal(output, plain(x))
    assert output.stride() == plain(x).stride()
    # Autograd refuses in-place operations on a view that a custom function returns, and allows them on one of its own.
    assert "unbatched" in name or not output._is_view() or output.grad_fn.name() == plain(x).grad_fn.name()


@pytest.mark.parametrize("rule", AUTOCAST)
@pytest.mark.parametrize("name", ["linear-3d", "conv1d", "conv2d"])
def test_under_autocast(name, rule):
    _, layer, x = converted(name, RULES[rule], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = [trained(layer, x, table["relu"]) for table in (WORK, APART)]
    for ours, apart in zip(*results, strict=True):
        torch.testing.assert_close(ours, apart)


@pytest.mark.parametrize("rule", AUTOCAST)
@pytest.mark.parametrize("name", ["linear-3d", "linear-3d-no-bias", "conv1d", "conv2d-no-bias"])
def test_under_torch_func(name, rule):
    """The transforms save no response, so every rule allows in-place operations."""
    _, layer, x = converted(name, RULES[rule])
    parameters = dict(layer.named_parameters())

    def value(parameters, x, work):
        return work(torch.func.functional_call(layer, parameters, (x.exp(),))).square().sum()

    ours, apart = (torch.func.grad(value, argnums=(0, 1))(parameters, x, t["relu"]) for t in (WORK, APART))
    torch.testing.assert_close(ours, apart)
    each, summed = (
        torch.func.vmap(torch.func.grad(value, argnums=1), (None, 0, None))(parameters, x[:, None], t["relu"])
        for t in (WORK, APART)
    )
    torch.testing.assert_close(each, summed)


@pytest.mark.parametrize("work", ["relu", "add"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 2, 5, 4)], ids=str)
def test_behind_the_op(shape, work):
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, (6, 4), (6, 4), (6,))]
    grads = []
    for table in (WORK, APART):
        y = torch.ops.pyfeedback.fa_linear(*tensors, amp=0.3, null=0.2)
        torch.testing.assert_close(y, F.linear(tensors[0], tensors[1], tensors[3]), rtol=0, atol=0)
        grads.append(torch.autograd.grad(table[work](y).sum(), tensors))
    for ours, apart in zip(*grads, strict=True):
        torch.testing.assert_close(ours, apart)


@pytest.mark.parametrize("shape", [(9, 6), (3, 5, 6)], ids=str)
def test_the_op_raises_where_a_saved_response_was_changed(shape):
    tensors = [torch.randn(s, requires_grad=True) for s in (shape, (2, 6), (2, 6))]
    # The kernel of small layers computes the response again.
    with pyfeedback.backend("composite"):
        y = torch.ops.pyfeedback.fa_linear(*tensors, null=0.2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        F.relu(y, inplace=True).sum().backward()


@pytest.mark.parametrize("name", ["linear-3d", "conv1d", "linear-unbatched", "conv2d-unbatched"])
def test_compiled(name):
    _, layer, x = converted(name, RULES["aa"], torch.float32)
    compiled = torch.compile(nn.Sequential(layer, nn.ReLU(inplace=True)), fullgraph=True, backend="aot_eager")
    results = [trained(layer, x, APART["relu"]), trained(compiled, x, lambda y: y)]
    for ours, apart in zip(*results, strict=True):
        torch.testing.assert_close(ours, apart)


@pytest.mark.parametrize("name", ["linear-3d", "linear-unbatched"])
def test_without_gradients(name):
    plain, layer, x = converted(name, "fa")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(F.relu(layer(x), inplace=True), F.relu(plain(x)), rtol=0, atol=0)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 8), (5, 8)], ids=["batched", "unbatched"])
@pytest.mark.parametrize("rule", RULES)
def test_behind_attention(rule, shape, batch_first):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, dtype=torch.float64)
    pyfeedback.convert(attention, RULES[rule])
    x = torch.randn(shape, dtype=torch.float64)

    def attend(work):
        def forward(x):
            return work(attention(x, x, x)[0])

        return forward

    def gradients(forward):
        leaf = x.clone().requires_grad_()
        attention.zero_grad()
        forward(leaf).sum().backward()
        return [leaf.grad, *(p.grad for p in attention.parameters() if p.grad is not None)]

    for work in ("relu", "add"):
        for ours, apart in zip(gradients(attend(WORK[work])), gradients(attend(APART[work])), strict=True):
            torch.testing.assert_close(ours, apart)
