"""Memory of a training step: tensors saved for the backward pass, and peak memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback.testing import by_reference, peak_bytes

LEARNED = ("wm", "ia", "sa", "aa", "kp")
RULES = ("bp", "fa", *LEARNED)
BATCH, WIDTH, SIZE = 16, 32, 32
ACTIVATION = 4 * BATCH * WIDTH * SIZE * SIZE  # bytes of the largest activation


def network():
    """ResNet bottlenecks with batch norm: pointwise, 3x3 and strided layers, more activations than weights."""
    torch.manual_seed(0)

    def layer(c, k, kernel, stride=1):
        return nn.Conv2d(c, k, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(k), nn.ReLU(inplace=True)

    return nn.Sequential(
        *layer(3, WIDTH, 3), *layer(WIDTH, 8, 1), *layer(8, 8, 3), *layer(8, WIDTH, 1), *layer(WIDTH, 16, 1, stride=2),
        *layer(16, 16, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def converted(rule, layout=torch.contiguous_format):
    return pyfeedback.convert(network().to(memory_format=layout), rule)


def loss_of(model, layout=torch.contiguous_format):
    images = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=layout)
    return F.cross_entropy(model(images), torch.arange(BATCH) % 10)


def saved_bytes(model):
    """Bytes of the tensors saved by autograd without parameters; each storage counts once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in parameters:
            saved[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)  # keep the graph alive so that no memory is reused
    assert loss.requires_grad
    return sum(saved.values())


def peak(model, layout=torch.contiguous_format):
    loss_of(model, layout).backward()  # one-time allocations
    model.zero_grad()
    return peak_bytes(lambda: loss_of(model, layout).backward())


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_saves_more_than_backprop(rule):
    """The response is the tensor that batch norm saves anyway."""
    assert saved_bytes(converted(rule)) == saved_bytes(network())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rule", ["wm", "ia"])
def test_without_batch_norm_the_response_is_saved_or_recomputed(rule, bias):
    """With a bias, the output is not the response."""
    layers = nn.Conv2d(3, WIDTH, 3, padding=1, bias=bias), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    before = saved_bytes(model)
    assert saved_bytes(pyfeedback.convert(model, rule)) - before == (0 if bias else ACTIVATION)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("rule", RULES)
def test_the_peak_is_that_of_backprop(rule, layout):
    """Within 3 % plus the gradients of the feedback; ia and aa need one more largest activation."""
    model = converted(rule, layout)
    allowed = 1.03 * peak(network().to(memory_format=layout), layout)
    allowed += 4 * sum(p.numel() for p in pyfeedback.feedback_parameters(model) if p.requires_grad)
    allowed += ACTIVATION if rule in ("ia", "aa") else 0
    assert peak(model, layout) <= allowed


@pytest.mark.parametrize("rule", ["wm", "ia", "aa"])
def test_the_reference_needs_more_memory(rule):
    """A check of the two tests above: the graph of the regularizers keeps every response and its products."""
    with by_reference() as penalties:

        def step():
            loss = loss_of(model)
            (loss + sum(penalties)).backward()
            penalties.clear()

        model = converted(rule)
        assert peak_bytes(step) > 1.25 * peak(network())


def test_peak_bytes_counts_simultaneous_allocations():
    def run():
        first = torch.zeros(1 << 20)
        second = first + 1
        del first
        return second.sum()

    assert peak_bytes(run) == pytest.approx(2 << 22, abs=64)
