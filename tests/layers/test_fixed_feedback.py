"""Layers whose feedback needs no gradient: PyTorch's own backward node, with B in place of the saved W."""

import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import pyfeedback
from pyfeedback import functional

LAYERS = {
    "conv2d": (lambda bias: pyfeedback.nn.Conv2d(4, 6, 3, padding=1, bias=bias), (2, 4, 7, 7)),
    "conv1d": (lambda bias: pyfeedback.nn.Conv1d(4, 6, 3, bias=bias), (2, 4, 7)),
    "transposed": (lambda bias: pyfeedback.nn.ConvTranspose2d(4, 6, 3, stride=2, bias=bias), (2, 4, 5, 5)),
    "linear": (lambda bias: pyfeedback.nn.Linear(4, 6, bias=bias), (3, 4)),
    "tokens": (lambda bias: pyfeedback.nn.Linear(4, 6, bias=bias), (3, 5, 4)),
}


@pytest.fixture(params=[(name, bias) for name in LAYERS for bias in (True, False)], ids=lambda p: f"{p[0]}-{p[1]}")
def layer_and_input(request):
    torch.manual_seed(0)
    name, bias = request.param
    build, shape = LAYERS[name]
    return build(bias).double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)


def nodes(output):
    """The names of all nodes of the graph."""
    found, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is not None:
            found.add(node.name())
            left += [node for node, _ in node.next_functions]
    return found


def gradients(layer, x, output):
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return torch.autograd.grad(output, leaves, torch.linspace(-1, 1, output.numel()).double().view_as(output))


def by_formula(layer, x):
    """The output by the formula of the package, which every feedback that learns uses."""
    layer.feedback.requires_grad_(True)
    output = layer(x)
    layer.feedback.requires_grad_(False)
    assert "EagerLayerBackward" in nodes(output)
    return output


def test_the_gradients_are_those_of_the_formula(layer_and_input):
    layer, x = layer_and_input
    output, expected = layer(x), by_formula(layer, x)
    assert not any(name.startswith("Eager") for name in nodes(output))
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    for found, wanted in zip(gradients(layer, x, output), gradients(layer, x, expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        assert found.stride() == wanted.stride()


@pytest.mark.parametrize("frozen", ["input", "weight", "both"])
def test_what_needs_no_gradient_gets_none(layer_and_input, frozen):
    layer, x = layer_and_input
    layer.weight.requires_grad_(frozen == "input")
    x = x.detach().requires_grad_(frozen == "weight")
    output = layer(x)
    if not output.requires_grad:
        return
    output.sum().backward()
    assert (x.grad is None) == (frozen != "weight")
    assert (layer.weight.grad is None) == (frozen != "input")


def test_without_gradients_there_is_no_node(layer_and_input):
    layer, x = layer_and_input
    with torch.no_grad():
        output = layer(x)
    assert output.grad_fn is None
    torch.testing.assert_close(output, layer(x).detach(), rtol=0, atol=0)
    output.relu_()


def test_a_learning_feedback_makes_no_node_without_gradients():
    layer = pyfeedback.nn.Conv2d(4, 6, 3, rule="ia")
    with torch.no_grad():
        assert layer(torch.randn(2, 4, 7, 7)).grad_fn is None


def test_a_feedback_changed_in_between_is_an_error(layer_and_input):
    layer, x = layer_and_input
    output = layer(x)
    with torch.no_grad():
        layer.feedback.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: the feedback weight .* is at version"):
        output.sum().backward()


def test_double_backward_is_an_error(layer_and_input):
    layer, x = layer_and_input
    for variable in (x, layer.weight):
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(layer(x).square().sum(), variable, create_graph=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, of its first use
def test_forward_mode_is_refused(layer_and_input):
    layer, x = layer_and_input
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        layer(forward_ad.make_dual(x.detach(), torch.ones_like(x)))


def test_the_graph_can_be_kept_and_is_freed_otherwise(layer_and_input):
    layer, x = layer_and_input
    output = layer(x)
    first = torch.autograd.grad(output.sum(), x, retain_graph=True)
    second = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(output.sum(), x)


def test_a_loss_that_is_kept_does_not_keep_the_activations(layer_and_input):
    layer, x = layer_and_input
    hidden = x * 2
    memory = weakref.ref(hidden.untyped_storage())
    loss = layer(hidden).sum()
    loss.backward()
    del hidden
    assert memory() is None
    assert loss.item() == loss.item()


def test_hooks_on_saved_tensors_see_all_of_them(layer_and_input):
    layer, x = layer_and_input
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        output = layer(x)
    assert layer.feedback.shape in packed
    for found, wanted in zip(gradients(layer, x, output), gradients(layer, x, layer(x)), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(layer_and_input, reentrant):
    layer, x = layer_and_input
    output = checkpoint(layer, x, use_reentrant=reentrant)
    output.sum().backward()
    found = [x.grad, layer.weight.grad]
    wanted = torch.autograd.grad(layer(x).sum(), [x, layer.weight])
    torch.testing.assert_close(found, list(wanted))


@pytest.mark.parametrize("input", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("weight", ["contiguous", "channels_last"])
def test_gradients_have_the_layout_of_their_tensors(input, weight):
    layouts = {
        "contiguous": lambda t: t,
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    }
    x = layouts[input](torch.randn(2, 4, 5, 6)).requires_grad_()
    w, b = (layouts[weight](torch.randn(6, 4, 3, 3)) for _ in range(2))
    w.requires_grad_()
    grads = torch.autograd.grad(functional.fa_conv2d(x, w, b).sum(), [x, w])
    assert grads[1].stride() == w.stride()
    assert grads[0].stride() == (x.stride() if input != "sliced" else torch.empty_like(x).stride())


def test_a_tensor_of_another_class_uses_the_formula():
    class Counted(torch.Tensor):
        pass

    layer = pyfeedback.nn.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 7, 7).as_subclass(Counted).requires_grad_()
    assert "EagerLayerBackward" in nodes(layer(x))


def test_a_strided_pointwise_convolution_uses_the_formula():
    """PyTorch's weight gradient of a 1x1 convolution of stride 3 in channels_last corrupts the heap (torch 2.13)."""
    layer = pyfeedback.nn.Conv2d(4, 6, 1, stride=3)
    assert "EagerLayerBackward" in nodes(layer(torch.randn(2, 4, 7, 7, requires_grad=True)))
