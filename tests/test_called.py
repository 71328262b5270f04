"""``layer.called``, and the warning about a feedback gradient that is never cleared."""

import copy
import logging
import pickle

import pytest
import torch
from small_networks import perceptron
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import pyfeedback

LAYERS = {
    "linear": (lambda: nn.Linear(4, 4), (3, 4)),
    "unbatched": (lambda: nn.Linear(4, 4), (4,)),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3), (2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3), (2, 4, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3), (2, 4, 6, 6)),
}


class HidesTheWeight(nn.Module):
    """Reads the weight of a layer in a way that convert does not find."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.out(F.linear(x, next(self.qkv.parameters()), self.qkv.bias))


@pytest.mark.parametrize("rule", ["bp", "fa", "ia"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_forward_pass_sets_called(name, rule):
    make, shape = LAYERS[name]
    layer = pyfeedback.convert(make(), rule)
    assert not layer.called
    layer(torch.randn(shape))
    assert layer.called
    twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    assert all(twin.called for twin in twins)
    assert not pyfeedback.convert(layer, rule).called  # with new feedback
    layer(torch.randn(shape))
    plain = pyfeedback.unconvert(layer)
    assert "called" not in vars(plain)


@pytest.mark.parametrize("rule", ["bp", "fa"])
def test_attention_is_called_with_its_projections(rule):
    attention = pyfeedback.convert(nn.MultiheadAttention(4, 2), rule)
    x = torch.randn(3, 2, 4)
    attention(x, x, x)
    assert attention.called
    assert attention.out_proj.called is (rule != "bp")  # the forward pass of torch.nn reads the weight


def test_a_layer_whose_weight_is_read_in_hiding_was_not_called():
    model = pyfeedback.convert(HidesTheWeight(), "ia")
    model(torch.randn(2, 4)).sum().backward()
    assert (model.qkv.called, model.out.called) == (False, True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_was_called_and_compiles_once(name):
    torch._dynamo.reset()
    make, shape = LAYERS[name]
    counter = CompileCounterWithBackend("aot_eager")
    layer = pyfeedback.convert(make(), "ia")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(3):
        compiled(torch.randn(shape)).sum().backward()
    assert layer.called
    assert counter.frame_count == 1


def test_export_and_symbolic_tracing_of_the_plain_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    pyfeedback.convert(model, "ia")(torch.randn(2, 4))
    x = torch.randn(3, 4)
    pyfeedback.unconvert(model)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_symbolic_tracing_with_feedback_layers_as_leaves():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, pyfeedback.nn.FeedbackLayer) or super().is_leaf_module(module, name)

    model = pyfeedback.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "ia")
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    x = torch.randn(2, 4)
    assert not model[0].called
    torch.testing.assert_close(traced(x), model(x))
    assert traced.get_submodule("0").called


# Alignment of layers that never run


def test_alignment_warns_once_about_a_layer_that_was_not_called(caplog):
    model = pyfeedback.convert(HidesTheWeight(), "ia")
    pyfeedback.alignment(model)
    assert not caplog.messages  # nothing has run yet
    model(torch.randn(2, 4)).sum().backward()
    monitor = pyfeedback.Monitor(model, every=1)
    monitor.step()
    (message,) = caplog.messages
    assert "qkv" in message
    assert "neither called nor used in a product" in message
    assert "out" not in message.replace("without", "")


# A feedback gradient that is never cleared


def train(model, optimizer, steps=3):
    x = torch.randn(4, 4)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_an_optimizer_built_before_convert_gives_a_warning(caplog):
    model = perceptron(4, 4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pyfeedback.convert(model, "ia")
    train(model, optimizer)
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2  # one per layer
    assert all("feedback.grad" in message and "optimizer" in message for message in caplog.messages)
    train(model, optimizer)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("layer", [nn.Conv2d(1, 1, 1), nn.ConvTranspose1d(4, 4, 1), nn.Conv1d(4, 4, 1)], ids=str)
def test_convolutions_warn_too(layer, caplog):
    pyfeedback.convert(layer, "ia")
    for _ in range(2):
        layer.weight.grad = None
        layer(torch.randn(2, *([1] if layer.weight.dim() == 4 else []), 4, 4)).sum().backward()
    assert len(caplog.records) == 1


def test_attention_warns_too(caplog):
    attention = nn.MultiheadAttention(4, 2)
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.01)
    pyfeedback.convert(attention, "ia")
    x = torch.randn(3, 2, 4)
    for _ in range(3):
        optimizer.zero_grad()
        attention(x, x, x)[0].sum().backward()
        optimizer.step()
    assert len(caplog.records) == 2  # the input projections and the output projection


@pytest.mark.parametrize("rule", ["fa", "ia", "kp", "pfa"])
def test_no_warning_if_both_gradients_are_cleared_or_accumulated(rule, caplog):
    model = pyfeedback.convert(perceptron(4, 4, 4), rule)
    train(model, torch.optim.SGD(model.parameters(), lr=0.01))
    train(model, pyfeedback.optim.SGD(model, lr=0.01))
    for _ in range(3):
        model(torch.randn(2, 4)).sum().backward()
    model.zero_grad()
    model(torch.randn(2, 4))
    assert not caplog.records


def test_no_warning_for_a_frozen_weight_or_evaluation(caplog):
    model = pyfeedback.convert(perceptron(4, 4, 4), "ia")
    with pyfeedback.schedules.alignment_only(model):
        for _ in range(2):
            model(torch.randn(2, 4)).sum().backward()
    with torch.no_grad():
        model(torch.randn(2, 4))
    assert not caplog.records


def test_a_parametrized_weight_has_no_gradient_of_its_own_to_compare(caplog):
    layer = pyfeedback.convert(nn.Linear(4, 4), "ia")
    nn.utils.parametrizations.weight_norm(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    train(layer, optimizer)
    assert not caplog.records
