"""``layer.called``, and the warning about layers that are never called."""

import copy
import pickle

import pytest
import torch
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


class ReadsTheWeight(nn.Module):
    """Like the attention of torchvision's Swin and of timm's BEiT."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.out(F.linear(x, self.qkv.weight, self.qkv.bias))


class Attends(nn.Module):
    """Convolutions, attention and a weight that is read, in one model."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv1d(4, 4, 1), nn.ConvTranspose1d(4, 4, 1)
        self.attention, self.reads = nn.MultiheadAttention(4, 2, batch_first=True), ReadsTheWeight()

    def forward(self, x):
        x = self.up(self.conv(x).relu()).transpose(1, 2)
        x, _ = self.attention(x, x, x)
        return self.reads(x)


def test_symbolic_tracing_under_dfa_is_refused():
    with pytest.raises(RuntimeError, match=r"^a layer follows dfa, expected another rule: a traced model has no hook"):
        torch.fx.symbolic_trace(pyfeedback.convert(Attends(), "dfa"))


@pytest.mark.parametrize("rule", ["fa", "ia", "kp"])
def test_symbolic_tracing_has_the_layers_as_leaves(rule):
    torch.manual_seed(0)
    model = pyfeedback.convert(Attends().double(), rule)
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    assert not model.conv.called
    found = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert found == {"conv", "up", "attention", "reads"}
    gradients = []
    for each in (model, traced):
        each.zero_grad()
        each(x).square().sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert traced.get_submodule("conv").called
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad)


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
