"""A layer repeats its last call only if nothing but values has changed; otherwise it checks and decides again."""

import copy
import pickle

import pytest
import torch
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import pyfeedback
from pyfeedback import nn

KINDS = {"linear": (3, 6), "conv2d": (2, 6, 7, 7)}
RULES = ("fa", "sa", "wm")


def called(kind, rule, bias=True):
    """A layer that recalls a call, and its input."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias, rule=rule) if kind == "linear" else nn.Conv2d(6, 5, 3, bias=bias, rule=rule)
    x = torch.randn(KINDS[kind], requires_grad=True)
    layer(x)
    assert layer.recalled is not None
    return layer, x


@pytest.fixture(params=[(kind, rule) for kind in KINDS for rule in RULES], ids="-".join)
def layer_and_input(request):
    return called(*request.param)


def gradients(layer, x):
    x = x.detach().requires_grad_()
    output = layer(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, *filter(is_trained, layer.parameters())])]


def is_trained(p):
    return p.requires_grad


def repeats(layer, x, monkeypatch):
    """Whether a call is repeated without its checks."""
    with monkeypatch.context() as patch:
        checked = []
        patch.setattr(pyfeedback.functional, "check_layer", lambda *arguments: checked.append(1))
        layer(x)
    return not checked


def test_a_repeated_call_is_bit_for_bit_the_first(layer_and_input, monkeypatch):
    layer, x = layer_and_input
    assert repeats(layer, x, monkeypatch)
    assert repeats(layer, torch.randn_like(x).requires_grad_(), monkeypatch)
    found = gradients(layer, x)
    layer.recalled = None
    for a, b in zip(found, gradients(layer, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{"samples": 0.4}, {"samples": 3}, {"reduction": "mean"}], ids=str)
@pytest.mark.parametrize("name", ["wm", "aa"])
def test_coefficients_that_depend_on_the_shapes(name, options, monkeypatch):
    layer = nn.Conv2d(6, 5, 3, rule=pyfeedback.rule(name, **options))
    for size in ((5, 6, 7, 7), (10, 6, 5, 4), (5, 6, 7, 7)):
        x = torch.randn(size, requires_grad=True)
        layer.recalled = None
        first = gradients(layer, x)
        assert repeats(layer, x, monkeypatch)
        for a, b in zip(first, gradients(layer, x), strict=True):
            assert torch.equal(a, b)
        sizes = torch.randn(4, *size[1:], requires_grad=True)
        assert not repeats(layer, sizes, monkeypatch)


def shape(layer, x):
    return x[:, :-1]


def dtype(layer, x):
    return x.double()


def integers(layer, x):
    return x.detach().long()


def sparse(layer, x):
    return x.detach().to_sparse()


def meta(layer, x):
    return x.to("meta")


def number(layer, x):
    return 3


def feedback_shape(layer, x):
    layer.feedback.data = layer.feedback.data[1:]
    return x


def feedback_dtype(layer, x):
    layer.feedback.data = layer.feedback.data.double()
    return x


def weight_dtype(layer, x):
    layer.weight.data = layer.weight.data.bfloat16()
    return x


def bias_shape(layer, x):
    layer.bias.data = layer.bias.data[:1]
    return x


@pytest.mark.parametrize(
    "change",
    [shape, dtype, integers, sparse, meta, number, feedback_shape, feedback_dtype, weight_dtype, bias_shape],
    ids=lambda change: change.__name__,
)
def test_bad_input_is_refused_as_in_a_first_call(change, layer_and_input):
    layer, x = layer_and_input
    bad = change(layer, x)
    with pytest.raises((TypeError, ValueError)) as found:
        layer(bad)
    layer.recalled = None
    with pytest.raises(type(found.value)) as expected:
        layer(bad)
    assert str(found.value) == str(expected.value)
    assert "\n" not in str(found.value)


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a backend": lambda: pyfeedback.backend("composite"),
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "a function mode": Mode,
    "inference": torch.inference_mode,
    "forward AD": torch.autograd.forward_ad.dual_level,
}


def test_numbers_of_another_type_are_refused():
    layer, x = called("conv2d", "fa")
    layer.stride = (1.0, 1.0)
    with pytest.raises(TypeError, match="stride is"):
        layer(x)


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_is_not_overlooked(name, layer_and_input, monkeypatch):
    layer, x = layer_and_input
    with CONTEXTS[name]():
        assert not repeats(layer, x, monkeypatch)
    layer(x)
    assert repeats(layer, x, monkeypatch)


def other_rule(layer):
    layer.rule = layer.rule.name


def other_window(layer):
    if isinstance(layer, nn.Conv2d):
        layer.stride = (2, 2)
    else:
        layer.weight.requires_grad_(False)


def other_backend(layer):
    pyfeedback.set_backend("auto")


def parametrization(layer):
    parametrize.register_parametrization(layer, "weight", torch.nn.Identity())


def marked_as_uncalled(layer):
    layer.called = False


@pytest.mark.parametrize(
    "change", [other_rule, other_window, other_backend, parametrization, marked_as_uncalled], ids=lambda f: f.__name__
)
def test_a_change_of_the_layer_is_not_overlooked(change, layer_and_input, monkeypatch):
    layer, x = layer_and_input
    change(layer)
    assert not repeats(layer, x, monkeypatch)
    assert layer.called


def test_padding_of_another_mode_is_not_overlooked():
    layer = nn.Conv2d(6, 5, 3, padding=1, rule="fa")
    x = torch.randn(2, 6, 7, 7)
    zeros = layer(x)
    layer.padding_mode = "reflect"
    layer._reversed_padding_repeated_twice = [1, 1, 1, 1]
    assert not torch.equal(layer(x), zeros)


def test_a_copy_recalls_nothing(layer_and_input, monkeypatch):
    layer, x = layer_and_input
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.recalled is None
        assert torch.equal(twin(x), layer(x))
        assert repeats(twin, x, monkeypatch)


def test_double_backward_and_changes_of_the_feedback_are_refused_in_a_repeated_call(layer_and_input):
    layer, x = layer_and_input
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    output = layer(x)
    with torch.no_grad():
        layer.feedback.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_without_a_bias_and_without_gradients(monkeypatch):
    for kind in KINDS:
        layer, x = called(kind, "wm", bias=False)
        with torch.no_grad():
            assert repeats(layer, x, monkeypatch)
            assert not layer(x).requires_grad
        assert layer(x).grad_fn is not None
        assert torch.func.vmap(layer)(x.detach().unsqueeze(0)).shape == (1, *layer(x).shape)
