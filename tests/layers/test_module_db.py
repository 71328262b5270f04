"""Every module of PyTorch's own test suite, converted: outputs are unchanged, and gradients are those of the reference.

The modules and their inputs come from `torch.testing._internal.common_modules`.
"""

import contextlib

import pytest
import torch
from cases import largest_error
from torch import nn
from torch.utils._pytree import tree_map_only
from torch_suites import FunctionInput, assert_same, copied, module_db, tensors_of

import pyfeedback
from pyfeedback.testing import by_reference

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # nested tensors; copies for padding="same"

DTYPES = (torch.float32, torch.float64)
RULES = {
    "fa": pyfeedback.rule("fa"),
    "ia": pyfeedback.rule("ia", amp=0.3, null=0.2, decay=0.1),
    "kp": pyfeedback.rule("kp", decay=0.1),
}
ONE_LAYER = {f"nn.{kind}" for kind in ("Linear", *(f"Conv{t}{n}d" for t in ("", "Transpose") for n in (1, 2, 3)))}
LAZY = {name.replace("nn.", "nn.Lazy") for name in ONE_LAYER - {"nn.Linear"}}  # LazyLinear is not listed
TRANSFORMERS = {f"nn.Transformer{part}" for part in ("", "Encoder", "EncoderLayer", "DecoderLayer")}
CONVERTIBLE = ONE_LAYER | TRANSFORMERS | {"nn.MultiheadAttention"}
RECURRENT = {
    f"nn.{name}{cell}" for name in ("GRU", "LSTM", "RNN") for cell in ("", "Cell")
}  # by use: test_recurrent.py
# A whole Transformer has the layers of its encoder and decoder.
EACH = [pytest.param(name, marks=[pytest.mark.long] * (name == "nn.Transformer")) for name in sorted(CONVERTIBLE)]
# Has a Linear whose weight it reads without calling it. The report of convert is tested elsewhere.
READS_WEIGHT = "nn.LinearCrossEntropyLoss"
MODULES = {info.name: info for info in module_db if info.name != READS_WEIGHT}


def samples(name, dtype, step=1):
    """The constructor and the inputs of each sample in training mode; for transformers, every step-th sample."""
    info = MODULES[name]
    torch.manual_seed(0)
    found = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    for sample in found[:: step if name in TRANSFORMERS else 1]:
        yield sample.constructor_input, sample.forward_input


def build(name, constructor, dtype):
    torch.manual_seed(0)
    return MODULES[name].module_cls(*constructor.args, **constructor.kwargs).to(dtype)


def convert(module, rule, at_the_weight=False):
    """Convert a module, optionally with every feedback equal to its weight."""
    pyfeedback.convert(module, rule)
    if at_the_weight:
        for _, layer in pyfeedback.feedback_layers(module):
            layer.feedback.data.copy_(layer.weight)
    return module


def pass_through(module, inputs, penalties=()):  # the module appends to penalties when it runs
    """Outputs, gradients of the inputs, and gradients of the parameters by name, for a fixed random output gradient.

    Unused parameters have no gradient and are omitted.
    """
    args, kwargs = copied((inputs.args, inputs.kwargs))
    torch.manual_seed(1)
    outputs = [t for t in tensors_of(module(*args, **kwargs)) if t.requires_grad]
    roots = [*outputs, *penalties]
    torch.autograd.backward(roots, [torch.randn_like(t) for t in outputs] + [torch.ones_like(p) for p in penalties])
    of_inputs = [t.grad for t in tensors_of((args, kwargs)) if t.requires_grad]
    of_parameters = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return [t.detach() for t in outputs], of_inputs, of_parameters


def values(passed, with_feedback=False):
    """All tensors of :func:`pass_through`, with the parameters in the order of their names."""
    outputs, of_inputs, gradients = passed
    gradients = {n: t for n, t in gradients.items() if with_feedback or not n.endswith("feedback")}
    return [*outputs, *of_inputs, *(gradients[n] for n in sorted(gradients))]


def widened(tree):
    return tree_map_only(torch.Tensor, lambda t: copied(t).double() if t.is_floating_point() else t, tree)


def description(module):
    """The visible state of a module: names and values of the state dict, types, attributes and repr."""
    fields = [(type(m), vars(m).keys(), m._parameters.keys(), m._buffers.keys()) for m in module.modules()]
    return fields, {n: None if nn.parameter.is_lazy(t) else t for n, t in module.state_dict().items()}, repr(module)


def assert_described_alike(module, expected):
    found = description(module)
    assert (found[0], found[2]) == (expected[0], expected[2])
    assert_same(found[1], expected[1])


@pytest.mark.parametrize("value", [True, False])
def test_importing_the_list_keeps_torch_backends_assignable(monkeypatch, value):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", value)
    assert torch.backends.cudnn.benchmark is value


def test_the_expected_modules_are_in_the_list():
    assert set(MODULES) >= CONVERTIBLE | LAZY
    for name in CONVERTIBLE:
        constructor, _ = next(samples(name, torch.float32))
        assert pyfeedback.convert(build(name, constructor, torch.float32), "fa", return_report=True)[1].changed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EACH)
def test_backprop_by_a_converted_module_is_the_plain_one(name, dtype):
    for constructor, inputs in samples(name, dtype):
        expected = pass_through(build(name, constructor, dtype), inputs)
        found = pass_through(convert(build(name, constructor, dtype), "bp"), inputs)
        assert_same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", sorted(ONE_LAYER))
def test_one_layer_keeps_the_output_and_the_gradients_of_its_parameters(name, rule, dtype):
    """For any feedback, the weight gradient is that of autograd."""
    for constructor, inputs in samples(name, dtype):
        outputs, _, gradients = pass_through(build(name, constructor, dtype), inputs)
        found, of_inputs, found_gradients = pass_through(convert(build(name, constructor, dtype), RULES[rule]), inputs)
        assert_same(found, outputs)
        feedback = found_gradients.pop("feedback", None)
        assert (feedback is None) == (rule == "fa")
        assert all(grad.isfinite().all() for grad in of_inputs)
        assert found_gradients.keys() == gradients.keys()
        torch.testing.assert_close(found_gradients, gradients)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", EACH)
def test_with_feedback_equal_to_the_weight_every_gradient_is_backprops(name, rule):
    for constructor, inputs in samples(name, torch.float64, step=2):
        expected = pass_through(build(name, constructor, torch.float64), inputs)
        module = convert(build(name, constructor, torch.float64), RULES[rule], at_the_weight=True)
        assert largest_error(values(pass_through(module, inputs)), values(expected)) < 1e-9


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", EACH)
def test_float32_error_is_at_most_twice_that_of_backprop(name, rule):
    """On average over the samples, the error is at most twice that of the plain module in the same dtype."""
    found, plain, tensors = 0.0, 0.0, 0
    for constructor, inputs in samples(name, torch.float32, step=3):
        wide = FunctionInput(*widened(inputs.args), **widened(inputs.kwargs))
        oracle = values(pass_through(build(name, constructor, torch.float32).double(), wide))
        module = convert(build(name, constructor, torch.float32), RULES[rule], at_the_weight=True)
        for each, t in zip(values(pass_through(module, inputs)), oracle, strict=True):
            found += largest_error([each], [t])
        for each, t in zip(values(pass_through(build(name, constructor, torch.float32), inputs)), oracle, strict=True):
            plain += largest_error([each], [t])
        tensors += len(oracle)
    assert found <= 2 * plain + tensors * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("rule", ["ia", "kp"])
@pytest.mark.parametrize("name", EACH)
def test_feedback_gradients_are_the_references(name, rule):
    for constructor, inputs in samples(name, torch.float64, step=3):
        results = []
        for computed in (contextlib.nullcontext([]), by_reference()):
            with computed as penalties:
                module = convert(build(name, constructor, torch.float64), RULES[rule])
                results.append(pass_through(module, inputs, penalties))
        assert any(n.endswith("feedback") for n in results[0][2])
        assert largest_error(*(values(each, with_feedback=True) for each in results)) < 1e-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EACH)
def test_conversion_and_back_leaves_everything_unchanged(name, dtype):
    for constructor, inputs in samples(name, dtype, step=3):
        module = build(name, constructor, dtype)
        expected = description(module)
        parameters = list(module.parameters())
        for rule in (*RULES, "bp", "pfa", "brsf"):
            pyfeedback.convert(module, rule)
            assert pyfeedback.unconvert(module) is module
        assert_described_alike(module, expected)
        assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
        assert_same(pass_through(module, inputs), pass_through(build(name, constructor, dtype), inputs))


@pytest.mark.parametrize("name", sorted(MODULES.keys() - CONVERTIBLE - RECURRENT))
def test_a_module_without_supported_layers_is_unchanged(name):
    for constructor, _ in samples(name, torch.float32):
        module = build(name, constructor, torch.float32)
        expected = description(module)
        report = pyfeedback.convert(module, "ia", return_report=True)[1]
        assert report.changed == []
        assert_described_alike(module, expected)
        assert_described_alike(pyfeedback.unconvert(module), expected)


@pytest.mark.parametrize("name", sorted(RECURRENT))
def test_a_recurrent_module_is_converted_and_back(name):
    for constructor, _ in samples(name, torch.float32):
        module = build(name, constructor, torch.float32)
        expected = description(module)
        assert pyfeedback.convert(module, "ia", return_report=True)[1].changed == [""]
        assert_described_alike(pyfeedback.unconvert(module), expected)


@pytest.mark.parametrize("name", sorted(LAZY))
def test_a_lazy_layer_converts_once_it_has_its_weights(name):
    for constructor, inputs in samples(name, torch.float32):
        module = build(name, constructor, torch.float32)
        assert pyfeedback.convert(module, "fa", return_report=True)[1].left
        expected = module(*inputs.args)
        assert pyfeedback.convert(module, "fa", return_report=True)[1].changed == [""]
        assert_same(module(*inputs.args), expected)
