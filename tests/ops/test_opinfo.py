"""PyTorch's own samples of convolutions and linear layers, through the ops, the functions and the layers.

They come from `torch.testing._internal.common_methods_invocations.op_db`.
"""

import warnings

import pytest
import torch
from cases import RULES, fresh, gradients, largest_error
from torch import nn
from torch.nn import functional as F
from torch_suites import assert_same, op_db

import pyfeedback
from pyfeedback import functional, reference
from pyfeedback.core.tensors import DTYPES

# Same padding with an even kernel copies the input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

CONVOLUTIONS = [f"conv{transposed}{n}d" for transposed in ("", "_transpose") for n in (1, 2, 3)]
INFO = {name: info for info in op_db if (name := info.name.removeprefix("nn.functional.")) in (*CONVOLUTIONS, "linear")}
OPS = {"function": functional, "dispatcher": torch.ops.pyfeedback}
WINDOW = ("stride", "padding", "dilation", "groups", "output_padding")


class Call:
    """One sample: the plain function with its tensors, and the same call of this package."""

    def __init__(self, name, sample):
        weight, bias, *_ = *sample.args, *[None] * (2 - len(sample.args))
        self.name, self.tensors = name, [sample.input, weight, bias]
        self.window = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0} | sample.kwargs
        if self.window["padding"] == "valid":
            self.window["padding"] = 0

    def __str__(self):
        sizes = [None if t is None else tuple(t.shape) for t in self.tensors]
        return f"{self.name} of {sizes} with {self.window}"

    @property
    def spatial(self):
        return 0 if self.name == "linear" else int(self.name[-2])

    @property
    def batched(self):
        """Whether the op supports the sample: a batch, and numeric padding."""
        rank = self.tensors[0].dim()
        return rank >= 2 if self.name == "linear" else rank == self.spatial + 2 and self.window["padding"] != "same"

    def plain(self, input, weight, bias):
        """The result of torch.nn.functional."""
        if self.name == "linear":
            return F.linear(input, weight, bias)
        names = [n for n in WINDOW if n != "output_padding" or "transpose" in self.name]
        return getattr(F, self.name)(input, weight, bias, **{n: self.window[n] for n in names})

    def ours(self, ops, input, weight, feedback, bias, **rule):
        """The result of `ops` (functions or dispatcher), or of the reference, which also returns a regularizer."""
        names = (
            ("linear", "conv2d", "convolution") if ops is reference else ("fa_linear", "fa_conv2d", "fa_convolution")
        )
        linear, conv2d, convolution = (getattr(ops, n) for n in names)
        if self.name == "linear":
            return linear(input, weight, feedback, bias, **rule)
        if self.name == "conv2d":
            return conv2d(input, weight, feedback, bias, **{n: self.window[n] for n in WINDOW[:4]}, **rule)
        window = {n: [v] * self.spatial if isinstance(v, int) else v for n, v in self.window.items() if n != "groups"}
        window |= {"transposed": "transpose" in self.name, "groups": self.window["groups"]}
        return convolution(input, weight, feedback, bias, **window, **rule)


def calls(name, dtype=torch.float64, batched=True):
    torch.manual_seed(0)
    samples = INFO[name].sample_inputs("cpu", dtype, requires_grad=dtype.is_floating_point or dtype.is_complex)
    found = [Call(name, sample) for sample in samples]
    return [call for call in found if call.batched or not batched]


def passed(outputs, tensors):
    """Output and gradients for a fixed random output gradient."""
    output, penalty = outputs if isinstance(outputs, tuple) else (outputs, None)
    torch.manual_seed(1)
    torch.autograd.backward([output], [torch.randn(output.shape, dtype=torch.float64).to(output.dtype)])
    if penalty is not None and penalty.requires_grad:
        penalty.backward()
    return [output.detach(), *gradients(tensors)]


def test_every_operator_has_samples_with_and_without_a_batch():
    assert sorted(INFO) == sorted([*CONVOLUTIONS, "linear"])
    for name in INFO:
        assert len(calls(name)) >= 4
        assert len(calls(name, batched=False)) > len(calls(name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", INFO)
def test_forward_is_torchs_bit_for_bit(name, ops, dtype):
    for call in calls(name, dtype):
        input, weight, bias = call.tensors
        found = call.ours(OPS[ops], input, weight, torch.randn_like(weight), bias, amp=0.1, null=0.1, decay=0.1)
        assert_same(found, call.plain(input, weight, bias))


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", INFO)
def test_with_feedback_equal_to_the_weight_gradients_are_autograds(name, ops):
    for call in calls(name):
        expected, found = fresh(call.tensors), fresh(call.tensors)
        values = passed(call.plain(*expected), expected)
        input, weight, bias = found
        output = call.ours(OPS[ops], input, weight, weight.detach().clone(), bias, amp=0.1, null=0.1)
        assert largest_error(passed(output, found), values) < 1e-12, str(call)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.float64], ids=str)
@pytest.mark.parametrize("name", INFO)
def test_error_is_at_most_twice_that_of_autograd(name, dtype):
    """On average over the samples, the error is at most twice that of plain PyTorch in the same dtype."""
    found, plain, tensors = 0.0, 0.0, 0
    for call in calls(name, dtype):
        if call.tensors[0].numel() == 0:
            continue
        exact, narrow, ours = fresh(call.tensors, torch.float64), fresh(call.tensors), fresh(call.tensors)
        oracle = passed(call.plain(*exact), exact)
        output = call.ours(functional, ours[0], ours[1], ours[1].detach().clone(), ours[2])
        pairs = zip(passed(output, ours), passed(call.plain(*narrow), narrow), oracle, strict=True)
        errors = [(largest_error([a], [o]), largest_error([b], [o])) for a, b, o in pairs]
        found, plain, tensors = (
            found + sum(e[0] for e in errors),
            plain + sum(e[1] for e in errors),
            tensors + len(errors),
        )
    assert found <= 2 * plain + tensors * torch.finfo(dtype).eps


@pytest.mark.parametrize("rule", ["ia-centered", "aa", "kp", "everything"])
@pytest.mark.parametrize("name", INFO)
def test_gradients_of_every_rule_are_the_references(name, rule):
    for call in calls(name):
        input, weight, bias = call.tensors
        if input.shape[0] == 0:
            continue
        tensors = [input, weight, torch.randn_like(weight), bias]
        results = []
        for ops in (functional, reference):
            leaves = fresh(tensors)
            results.append(passed(call.ours(ops, *leaves, **RULES[rule]), leaves))
        assert largest_error(*results) < 1e-11, str(call)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", INFO)
def test_gradcheck(name, ops):
    """Numerical gradients, with the feedback equal to the weight."""
    for call in calls(name):
        input, weight, bias = call.tensors
        if input.numel() > 200:
            continue
        leaves = [input, weight] if bias is None else [input, weight, bias]
        torch.autograd.gradcheck(
            lambda x, w, b=None, call=call: call.ours(OPS[ops], x, w, w.detach().clone(), b), leaves, fast_mode=True
        )


def layer_of(call, dtype):
    """The torch.nn module of the sample, with its weights."""
    _, weight, bias = call.tensors
    if call.name == "linear":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
    else:
        kind = getattr(nn, call.name.replace("conv_transpose", "ConvTranspose").replace("conv", "Conv"))
        groups, transposed = call.window["groups"], "transpose" in call.name
        near, far = weight.shape[0], weight.shape[1] * groups
        channels = (near, far) if transposed else (far, near)
        window = {n: call.window[n] for n in (WINDOW if transposed else WINDOW[:4])}
        layer = kind(*channels, tuple(weight.shape[2:]), **window, bias=bias is not None, dtype=dtype)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", INFO)
def test_layers_accept_every_sample(name, dtype):
    """Including string padding and unbatched inputs: the output is torch's, and the gradients are too if B is W."""
    for call in calls(name, dtype, batched=False):
        plain, layer = layer_of(call, dtype), layer_of(call, dtype)
        pyfeedback.convert(layer, pyfeedback.rule("ia", amp=0.1, null=0.1))
        layer.feedback.data.copy_(layer.weight)
        results = []
        for module in (layer, plain):
            (input,) = fresh(call.tensors[:1])
            bias = [] if plain.bias is None else [module.bias]
            results.append(passed(module(input), [input, module.weight, *bias]))
        assert_same(results[0][0], results[1][0])
        if dtype is torch.float64:
            assert largest_error(*results) < 1e-12, str(call)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", [name for name in INFO if INFO[name].error_inputs_func])
def test_what_torch_refuses_is_refused_in_one_line(name, ops):
    refused = 0
    for error in INFO[name].error_inputs("cpu"):
        call = Call(name, error.sample_input)
        if call.window["padding"] != "same":
            input, weight, bias = call.tensors
            with pytest.raises((ValueError, TypeError)) as found:
                call.ours(OPS[ops], input, weight, weight.clone(), bias)
            assert "\n" not in str(found.value)
            refused += 1
    assert refused >= 5


@pytest.mark.parametrize("name", INFO)
def test_dtypes_that_only_torch_supports_are_refused_in_one_line(name):
    refused = 0
    for dtype in INFO[name].dtypes - set(DTYPES):
        call = calls(name, dtype)[0]
        input, weight, bias = call.tensors
        with pytest.raises(TypeError, match=rf"^input has dtype {dtype}, expected float64") as found:
            call.ours(functional, input, weight, weight.clone(), bias)
        assert "\n" not in str(found.value)
        refused += 1
    assert refused >= 3
