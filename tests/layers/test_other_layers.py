"""Layers other than Conv2d and Linear: other dimensions, transposed, attention; skipped layers and the reason."""

import copy
import itertools

import pytest
import torch
from cases import RULES, gradients, largest_error
from layer_cases import random_convolution
from torch import nn

import pyfeedback
from pyfeedback import functional, reference

APIS = {"dispatcher": torch.ops.pyfeedback.fa_convolution, "function": functional.fa_convolution}


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("number", range(90))
def test_convolution_against_reference(number, api):
    size, weight, bias, window = random_convolution(number)
    rule = dict(list(RULES.values())[number % len(RULES)])
    if number % 4 == 1 and size[0] > 1:
        rule["samples"] = size[0] - 1
    torch.manual_seed(number)
    drawn = [s if s is None else torch.randn(s, dtype=torch.float64) for s in (size, weight, weight, bias)]
    results = []
    for op in (APIS[api], reference.convolution):
        tensors = [t if t is None else t.clone().requires_grad_() for t in drawn]
        output = op(*tensors, *window, **rule)
        output, penalty = output if isinstance(output, tuple) else (output, torch.zeros(()))
        torch.manual_seed(1)
        loss = (output * torch.randn_like(output)).sum() + penalty
        loss.backward()
        results.append([output.detach(), *gradients(tensors)])
    assert largest_error(*results) < 1e-12, (size, weight, window, rule)


@pytest.mark.parametrize("number", range(0, 24, 2))
def test_two_dimensions_are_conv2d(number):
    size, weight, bias, (*window, _, _, groups) = random_convolution(3 * number + 4)
    assert len(size) == 4
    torch.manual_seed(number)
    drawn = [s if s is None else torch.randn(s, dtype=torch.float64) for s in (size, weight, weight, bias)]
    results = []
    for op, options in (
        (functional.fa_convolution, (*window[:3], False, 0, groups)),
        (functional.fa_conv2d, (*window[:3], groups)),
    ):
        tensors = [t if t is None else t.clone().requires_grad_() for t in drawn]
        output = op(*tensors, *options, **RULES["everything"])
        output.sum().backward()
        results.append([output.detach(), *gradients(tensors)])
    assert largest_error(*results) < 1e-12


# torch raises it about its own code.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("number", range(6))
def test_opcheck(number):
    size, weight, bias, window = random_convolution(number)
    tensors = [s if s is None else torch.randn(s, requires_grad=True) for s in (size, weight, weight, bias)]
    rule = {"amp": 0.1, "null": 0.2, "decay": 0.3}
    torch.library.opcheck(torch.ops.pyfeedback.fa_convolution.default, (*tensors, *window), rule)
    moving = {"center": False, "samples": 0, "positions": 1}
    scheduled = (*tensors, torch.tensor([0.3, 0.1, 0.2, 0.0, 0.0, 0.0], dtype=torch.float64), *window)
    torch.library.opcheck(torch.ops.pyfeedback.scheduled_layer.default, scheduled, moving)


BAD = {
    "rank": ({"weight": torch.randn(4, 3)}, "weight has rank 2, shape (4, 3), expected rank 3, [K, C/groups, ...]"),
    "input rank": ({"input": torch.randn(2, 4, 9, 9)}, "input has rank 4, shape (2, 4, 9, 9), expected rank 3, [N"),
    "channels": ({"input": torch.randn(2, 5, 9)}, "input has 5 channels, shape (2, 5, 9), expected 4, the input"),
    "plain": ({"transposed": False}, "input has 4 channels, shape (2, 4, 9), expected 6 = 6 of weight * 1 groups"),
    "bias": ({"bias": torch.randn(4)}, "bias has shape (4,), expected (6,), the output channels of weight"),
    "numbers": ({"stride": (1, 1)}, "stride is (1, 1), expected 1 numbers, one for each spatial dimension"),
    "stride": ({"stride": 0}, "stride is (0,), expected 1 or more"),
    "extra": ({"output_padding": 2}, "output_padding is (2,), expected less than stride (2,) or dilation (1,)"),
    "nothing": ({"padding": 11}, "input has a size of (9,) and the output would have (-3,), expected 1 or more"),
    "samples": ({"samples": 3}, "samples is 3, expected 0 (all) to 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, message = BAD[case]
    good = {
        "input": torch.randn(2, 4, 9), "weight": torch.randn(4, 6, 3), "feedback": torch.randn(4, 6, 3),
        "bias": torch.randn(6), "stride": 2, "transposed": True,
    }  # fmt: skip
    functional.fa_convolution(**good)
    with pytest.raises((ValueError, TypeError)) as error:
        functional.fa_convolution(**{**good, **change})
    assert str(error.value).startswith(message)


def test_output_padding_requires_a_transposed_layer():
    x, w = torch.randn(2, 4, 9), torch.randn(6, 4, 3)
    with pytest.raises(ValueError, match=r"output_padding is \(1,\), expected 0 for"):
        functional.fa_convolution(x, w, w, output_padding=1)


# Each layer with its arguments and an input. torch warns about a copy for same padding with an even kernel.
LAYERS = {
    "conv1d": (nn.Conv1d, (4, 6, 3), {"padding": 1, "stride": 2}, (3, 4, 9)),
    "conv1d same": (nn.Conv1d, (4, 6, 3), {"padding": "same", "dilation": 2}, (3, 4, 9)),
    "conv1d even": (nn.Conv1d, (4, 6, 4), {"padding": "same", "bias": False}, (3, 4, 9)),
    "conv1d circular": (nn.Conv1d, (4, 6, 3), {"padding": 1, "padding_mode": "circular"}, (3, 4, 9)),
    "conv3d": (nn.Conv3d, (4, 6, 3), {"padding": 1, "groups": 2}, (3, 4, 4, 5, 3)),
    "conv3d depthwise": (nn.Conv3d, (4, 4, (1, 3, 2)), {"groups": 4, "bias": False}, (3, 4, 4, 5, 3)),
    "transpose1d": (nn.ConvTranspose1d, (4, 6, 3), {"stride": 2, "output_padding": 1}, (3, 4, 5)),
    "transpose2d": (nn.ConvTranspose2d, (4, 6, 3), {"stride": 2, "padding": 1, "bias": False}, (3, 4, 5, 4)),
    "transpose3d": (nn.ConvTranspose3d, (4, 6, 2), {"groups": 2, "dilation": 2}, (3, 4, 3, 4, 2)),
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
RULE = pyfeedback.Rule(amp=0.3, null=0.2, decay=0.1, center=True, reduction="mean", samples=2)


@pytest.mark.parametrize("case", LAYERS)
def test_converts_and_back(case):
    kind, arguments, options, size = LAYERS[case]
    torch.manual_seed(0)
    layer, x = kind(*arguments, **options), torch.randn(size)
    plain, expected = copy.deepcopy(layer), layer(x)
    assert pyfeedback.convert(layer, RULE, return_report=True)[1].changed == [""]
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x[0]), plain(x[0]))
    layer(x).square().sum().backward()
    assert layer.feedback.grad.shape == layer.weight.shape
    assert layer.feedback.grad.norm() > 0
    pyfeedback.convert(layer, "bp")
    assert torch.equal(layer(x), expected)
    assert type(pyfeedback.unconvert(layer)) is kind


@pytest.mark.parametrize("case", LAYERS)
def test_feedback_equal_to_the_weight_is_backprop(case):
    """With B equal to W, the feedback path is the gradient."""
    kind, arguments, options, size = LAYERS[case]
    torch.manual_seed(0)
    layer, x = kind(*arguments, **options).double(), torch.randn(size, dtype=torch.float64, requires_grad=True)
    leaves = (x, *layer.parameters())
    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    pyfeedback.convert(layer, "fa", init=lambda feedback: feedback.data.copy_(layer.weight))
    assert largest_error(torch.autograd.grad(layer(x).square().sum(), leaves), expected) < 1e-12


@pytest.mark.parametrize("case", ["conv1d", "conv3d", "transpose2d"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_compiles_whole(case, scheduled):
    kind, arguments, options, size = LAYERS[case]
    torch.manual_seed(0)
    layer, x = pyfeedback.convert(kind(*arguments, **options), RULE), torch.randn(size)
    layer(x).square().sum().backward()
    expected, layer.feedback.grad = layer.feedback.grad, None
    if scheduled:
        pyfeedback.schedules.Schedule(layer, amp=pyfeedback.schedules.constant(1.0))
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    torch.testing.assert_close(layer.feedback.grad, expected)


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("case", LAYERS)
def test_autocast(case, device):
    kind, arguments, options, size = LAYERS[case]
    layer = pyfeedback.convert(kind(*arguments, **options), RULE)
    with torch.autocast(device, torch.bfloat16):
        output = layer(torch.randn(size))
    assert output.dtype is torch.bfloat16
    output.sum().backward()
    assert layer.feedback.grad.dtype is torch.float32


def test_torch_func():
    layer = pyfeedback.convert(nn.ConvTranspose1d(3, 2, 3), RULE)
    x = torch.randn(4, 3, 5)
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert torch.allclose(torch.func.grad(lambda x: layer(x).square().sum())(x.detach()), x.grad)


def attention_inputs(of, batch_first, masked):
    """Query, key, value and masks of an attention layer with 8 channels and 2 heads."""
    n, queries, keys = 3, 4, 4 if of == "itself" else 5
    tensors = [torch.randn(n, length, 8, dtype=torch.float64) for length in (queries, keys, keys)]
    if of == "itself":
        tensors = [tensors[0]] * 3
    if of == "sample":
        tensors = [t[0] for t in tensors]
    elif not batch_first:
        swapped = tensors[0].transpose(0, 1)
        tensors = [swapped if t is tensors[0] else t.transpose(0, 1) for t in tensors]
    options = {}
    if masked in ("pairs", "both"):
        options["attn_mask"] = torch.rand(queries, keys) < 0.3
        options["attn_mask"][:, 0] = False
    if masked == "heads":
        options["attn_mask"] = torch.randn(2 * (1 if of == "sample" else n), queries, keys, dtype=torch.float64)
    if masked in ("padding", "both"):
        options["key_padding_mask"] = torch.rand(n, keys) < 0.3
        options["key_padding_mask"][:, 0] = False
        if of == "sample":
            options["key_padding_mask"] = options["key_padding_mask"][0]
    return tensors, options


@pytest.mark.parametrize("masked", ["not", "pairs", "heads", "padding", "both"])
@pytest.mark.parametrize("of", ["itself", "others", "sample"])
def test_attention_is_torch_nn_s(of, masked):
    """Output, weights and, with B equal to W, every gradient."""
    torch.manual_seed(0)
    for batch_first, append, zero, need, average, bias in itertools.product((False, True), repeat=6):
        options = {"batch_first": batch_first, "add_bias_kv": append, "add_zero_attn": zero, "bias": bias}
        layer = nn.MultiheadAttention(8, 2, **options, dtype=torch.float64)
        inputs, masks = attention_inputs(of, batch_first, masked)
        masks |= {"need_weights": need, "average_attn_weights": average}
        leaves = list(layer.parameters())
        output, weights = layer(*inputs, **masks)
        expected = torch.autograd.grad(output.square().sum(), leaves)
        pyfeedback.convert(layer, "fa")
        with torch.no_grad():
            layer.feedback.copy_(layer.in_proj_weight)
            layer.out_proj.feedback.copy_(layer.out_proj.weight)
        ours, our_weights = layer(*inputs, **masks)
        torch.testing.assert_close(ours, output)
        assert (our_weights is None) == (weights is None)
        if need:
            torch.testing.assert_close(our_weights, weights)
        assert largest_error(torch.autograd.grad(ours.square().sum(), leaves), expected) < 1e-10


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_feedback_learns_by_the_rule(batch_first):
    torch.manual_seed(0)
    rule = {"amp": 0.3, "sparse": 0.2, "decay": 0.1, "center": True}
    layer = pyfeedback.nn.MultiheadAttention(
        8, 2, batch_first=batch_first, dtype=torch.float64, rule=pyfeedback.Rule(**rule)
    )  # fmt: skip
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    placed = x if batch_first else x.transpose(0, 1)
    layer(placed, placed, placed)[0].square().sum().backward()
    feedback = layer.feedback.detach().clone().requires_grad_()
    reference.linear(x, layer.in_proj_weight, feedback, **rule)[1].backward()
    torch.testing.assert_close(layer.feedback.grad, feedback.grad)
    assert layer.out_proj.feedback.grad.norm() > 0


def test_separate_attention_projections_equal_packed_ones():
    """Self-attention of one tensor and attention of three equal tensors have the same gradients under every rule."""
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    for rule in RULES.values():
        layer = pyfeedback.nn.MultiheadAttention(8, 2, rule=pyfeedback.Rule(**rule), dtype=torch.float64)
        found = []
        for inputs in ((x, x, x), (x, x.clone(), x.clone())):
            layer.zero_grad()
            layer(*inputs)[0].square().sum().backward()
            found.append(gradients(list(layer.parameters())))
        assert largest_error(*found) < 1e-12


def test_encoder_layer_converts_trains_compiles_and_unconverts():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, names = torch.randn(3, 5, 8), set(model.state_dict())
    expected = model(x)
    report = pyfeedback.convert(model, "kp", return_report=True)[1]
    assert report.changed == ["self_attn", "self_attn.out_proj", "linear1", "linear2"]
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(pyfeedback.alignment(model)) == 4
    pyfeedback.unconvert(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected)
    assert type(model.self_attn) is nn.MultiheadAttention


def test_attention_reset_draws_everything():
    layer = pyfeedback.nn.MultiheadAttention(8, 2)
    before = {name: p.detach().clone() for name, p in layer.named_parameters() if p.dim() > 1 and "out" not in name}
    layer.reset_parameters()
    assert all(not torch.equal(layer.get_parameter(name), p) for name, p in before.items())


class Own(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize("layer", [Own(8, 2), nn.MultiheadAttention(8, 2, kdim=6), nn.Embedding(5, 8)], ids=repr)
def test_skipped_layers_are_reported(layer):
    model = nn.Sequential(nn.Linear(2, 3), layer)
    report = pyfeedback.convert(model, "ia", return_report=True)[1]
    assert report.changed == ["0"]
    assert "1" in report.left
    if isinstance(layer, nn.MultiheadAttention):
        assert report.left["1.out_proj"] == "its attention reads the weight without calling it"
    else:
        assert "no input gradient" in report.left["1"]


def test_attention_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match="kdim is 6 and vdim 8, expected embed_dim, 8, for both"):
        pyfeedback.nn.MultiheadAttention(8, 2, kdim=6)
