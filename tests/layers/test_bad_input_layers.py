"""Arguments of the wrong type for functions, ops and layers: a one-line error that names the argument."""

import numpy as np
import pytest
import torch
from torch import nn

import pyfeedback
from pyfeedback import functional
from pyfeedback.core.geometry import LINEAR as LINEAR_GEOMETRY
from pyfeedback.core.geometry import to_arguments

ARRAY = np.zeros((2, 4, 6, 6), np.float32)
CONV = {"input": torch.randn(2, 4, 6, 6), "weight": torch.randn(6, 4, 3, 3), "feedback": torch.randn(6, 4, 3, 3),
        "bias": torch.randn(6)}  # fmt: skip
LINEAR = {"input": torch.randn(2, 3, 4), "weight": torch.randn(6, 4), "feedback": torch.randn(6, 4),
          "bias": torch.randn(6)}  # fmt: skip
CONV1D = {"input": torch.randn(2, 4, 9), "weight": torch.randn(6, 4, 3), "feedback": torch.randn(6, 4, 3),
          "bias": torch.randn(6)}  # fmt: skip
GOOD = {"fa_conv2d": CONV, "fa_linear": LINEAR, "fa_convolution": CONV1D}

NO_TENSORS = {
    "None": (None, "None"),
    "number": (1.0, "1.0"),
    "list": ([[1.0]], "a list"),
    "tuple": ((1.0,), "(1.0,)"),
    "array": (ARRAY, "a numpy.ndarray of shape (2, 4, 6, 6)"),
    "string": ("x", "'x'"),
    "module": (nn.ReLU(), "a torch.nn.modules.activation.ReLU"),
}
NO_NUMBERS = {
    "None": (None, "None"),
    "string": ("0.1", "'0.1'"),
    "list": ([0.1], "a list"),
    "flag": (True, "True"),
    "tensor": (torch.tensor(0.1), "a tensor of shape ()"),
    "array": (np.zeros(3), "a numpy.ndarray of shape (3,)"),
    "complex": (1j, "1j"),
}
NO_FLAGS = {
    "string": ("no", "'no'"), "None": (None, "None"), "number": (1, "1"), "list": ([], "a list"),
    "tensor": (torch.tensor(True), "a tensor of shape ()"),
}  # fmt: skip
NO_SAMPLES = {
    "half": (0.5, "0.5"), "whole float": (1.0, "1.0"), "string": ("1", "'1'"), "None": (None, "None"),
    "flag": (True, "True"), "list": ([1], "a list"), "tensor": (torch.tensor(1), "a tensor of shape ()"),
}  # fmt: skip
NO_SIZES = {
    "half": (0.5, "(0.5"), "None": (None, "None"), "word": ("same", "'same'"), "floats": ((1.0, 1.0), "(1.0, 1.0)"),
    "nested": (((1, 1), (1, 1)), "((1, 1), (1, 1))"), "array": (np.ones((2, 2)), "a numpy.ndarray of shape (2, 2)"),
    "flag": (True, "(True"),
}  # fmt: skip
NO_GROUPS = {
    "half": (0.5, "0.5"), "None": (None, "None"), "string": ("1", "'1'"), "pair": ((1, 1), "(1, 1)"),
    "flag": (True, "True"),
}  # fmt: skip


def refuses(call, message, kinds=(TypeError, ValueError)):
    """The call raises a one-line error that starts with ``message`` and names the expected value."""
    with pytest.raises(kinds) as refused:
        call()
    text = str(refused.value)
    assert "\n" not in text
    assert text.startswith(message), text
    assert "expected" in text


@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize("name", ["input", "weight", "feedback", "bias"])
@pytest.mark.parametrize("function", GOOD)
def test_not_a_tensor(function, name, kind):
    value, shown = NO_TENSORS[kind]
    if name == "bias" and value is None:
        assert getattr(functional, function)(**{**GOOD[function], name: value}) is not None
        return
    refuses(
        lambda: getattr(functional, function)(**{**GOOD[function], name: value}), f"{name} is {shown}, expected a t"
    )


@pytest.mark.parametrize("name", ["input", "weight", "feedback"])
@pytest.mark.parametrize("function", GOOD)
def test_a_tensor_without_dimensions(function, name):
    call = getattr(functional, function)
    change = {name: torch.tensor(1.0)}
    said = "feedback has shape ()" if name == "feedback" else f"{name} has rank 0, shape ()"
    refuses(lambda: call(**{**GOOD[function], **change}), said)


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize("name", ["decay", "amp", "null", "sparse", "self_", "tie"])
@pytest.mark.parametrize("function", GOOD)
def test_not_a_coefficient(function, name, kind):
    value, shown = NO_NUMBERS[kind]
    refuses(
        lambda: getattr(functional, function)(**GOOD[function], **{name: value}),
        f"{name} is {shown}, expected a finite number",
    )


@pytest.mark.parametrize("kind", NO_FLAGS)
@pytest.mark.parametrize("function", GOOD)
def test_center_is_a_flag(function, kind):
    value, shown = NO_FLAGS[kind]
    refuses(lambda: getattr(functional, function)(**GOOD[function], center=value), f"center is {shown}, expected True")


@pytest.mark.parametrize("kind", NO_SAMPLES)
@pytest.mark.parametrize("function", GOOD)
def test_samples_are_a_whole_number(function, kind):
    value, shown = NO_SAMPLES[kind]
    refuses(
        lambda: getattr(functional, function)(**GOOD[function], samples=value), f"samples is {shown}, expected an int"
    )


@pytest.mark.parametrize("kind", NO_SIZES)
@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "output_padding"])
@pytest.mark.parametrize("function", ["fa_conv2d", "fa_convolution"])
def test_sizes_are_whole_numbers(function, name, kind):
    value, shown = NO_SIZES[kind]
    if function == "fa_conv2d" and name == "output_padding":
        return
    refuses(lambda: getattr(functional, function)(**GOOD[function], **{name: value}), f"{name} is {shown}")


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [(1,), (1, 1, 1), ()], ids=str)
def test_sizes_are_as_many_as_dimensions(name, value):
    refuses(lambda: functional.fa_conv2d(**CONV, **{name: value}), f"{name} is {value}, expected 2 ")


@pytest.mark.parametrize("kind", NO_GROUPS)
@pytest.mark.parametrize("function", ["fa_conv2d", "fa_convolution"])
def test_groups_are_a_whole_number(function, kind):
    value, shown = NO_GROUPS[kind]
    refuses(
        lambda: getattr(functional, function)(**GOOD[function], groups=value), f"groups is {shown}, expected an int"
    )


@pytest.mark.parametrize("kind", NO_FLAGS)
def test_transposed_is_a_flag(kind):
    value, shown = NO_FLAGS[kind]
    refuses(lambda: functional.fa_convolution(**CONV1D, transposed=value), f"transposed is {shown}, expected True or")


def test_an_unknown_coefficient():
    refuses(lambda: functional.fa_convolution(**CONV1D, gain=1.0), "gain is not a coefficient, expected one of decay,")


def test_integers_of_other_types_are_accepted():
    sizes = {"stride": [1, 1], "padding": torch.Size([1, 1]), "dilation": np.int64(1), "groups": np.int32(1)}
    expected = functional.fa_conv2d(**CONV, padding=1, decay=1.0)
    assert torch.equal(functional.fa_conv2d(**CONV, **sizes, decay=np.float64(1.0), amp=0, samples=2), expected)
    assert torch.equal(functional.fa_convolution(**CONV, **sizes, decay=1, samples=2), expected)


# Ops: the dispatcher reports violations of the schema; pyfeedback reports invalid values.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input", None), ("weight", ARRAY), ("feedback", [1.0]), ("bias", 1.0), ("stride", 0.5), ("padding", "same"),
        ("dilation", None), ("groups", 1.5), ("decay", "x"), ("amp", None), ("center", "no"), ("samples", 0.5),
    ],
    ids=str,
)  # fmt: skip
def test_the_schema_names_the_argument(name, value):
    with pytest.raises((RuntimeError, TypeError), match=name):
        torch.ops.pyfeedback.fa_conv2d(**{**CONV, name: value})


GRADIENT = {"grad_output": torch.randn(2, 6, 4, 4), **{k: v for k, v in CONV.items() if k != "bias"}}
LINEAR_GRADIENT = {"grad_output": torch.randn(2, 3, 6), **{k: v for k, v in LINEAR.items() if k != "bias"}}
OPS = {
    "mask too short": (
        lambda ops: ops.fa_conv2d_backward(**GRADIENT, output_mask=[True]),
        "output_mask has 1 entries, expected 4: input, weight, feedback, bias",
    ),
    "mask too long": (
        lambda ops: ops.fa_linear_backward(**LINEAR_GRADIENT, output_mask=[True] * 5),
        "output_mask has 5 entries, expected 4",
    ),
    "linear gradient": (
        lambda ops: ops.fa_linear_backward(**{**LINEAR_GRADIENT, "grad_output": torch.randn(2, 6)}),
        "grad_output has shape (2, 6), expected that of the output, (2, 3, 6)",
    ),
    "gradient on meta": (
        lambda ops: ops.fa_conv2d_backward(**{**GRADIENT, "grad_output": GRADIENT["grad_output"].to("meta")}),
        "grad_output is on meta, expected the device of input, cpu",
    ),
    "weight on meta": (
        lambda ops: ops.fa_conv2d_backward(**{**GRADIENT, "weight": GRADIENT["weight"].to("meta")}),
        "weight is on meta, expected the device of input, cpu",
    ),
    "response on meta": (
        lambda ops: ops.fa_linear_backward(**LINEAR_GRADIENT, response=torch.empty(2, 3, 6, device="meta")),
        "response is on meta, expected the device of input, cpu",
    ),
    "response sparse": (
        lambda ops: ops.fa_linear_backward(**LINEAR_GRADIENT, response=torch.randn(2, 3, 6).to_sparse()),
        "response has layout torch.sparse_coo, expected torch.strided",
    ),
    "gradient sparse": (
        lambda ops: ops.fa_linear_backward(**{**LINEAR_GRADIENT, "grad_output": torch.randn(2, 3, 6).to_sparse()}),
        "grad_output has layout torch.sparse_coo, expected torch.strided",
    ),
    "center of nothing": (
        lambda ops: ops.center(torch.randn(0, 3), 1),
        "samples is 1, expected 1 to 0, the size of the batch",
    ),
    "center of integers": (lambda ops: ops.center(torch.ones(2, 3).int(), 1), "input is (2, 3) torch.int32 on cpu, ex"),
    "center of no dimension": (lambda ops: ops.center(torch.tensor(1.0), 1), "input is () torch.float32 on cpu, exp"),
    "mixing rank": (lambda ops: ops.mix(torch.ones(3), torch.ones(3, 2), 0.1), "mixing has shape (3,), expected [K, M"),
    "mixing size": (
        lambda ops: ops.mix(torch.ones(4, 3), torch.ones(2, 2), 0.1),
        "feedback has shape (2, 2), expected [3, ...], as many rows as mixing has columns",
    ),
    "mixing dtype": (
        lambda ops: ops.mix(torch.ones(4, 3), torch.ones(3, 2).double(), 0.1),
        "feedback has dtype torch.float64, expected that of mixing, torch.float32",
    ),
    "mixing decay": (
        lambda ops: ops.mix(torch.ones(4, 3), torch.ones(3, 2), float("nan")),
        "decay is nan, expected a finite number",
    ),
    "coefficients shape": (
        lambda ops: ops.scheduled_layer(**LINEAR, **EMPTY, coefficients=torch.zeros(5).double(), **MOVING),
        "coefficients is (5,) torch.float64 on cpu, expected (6,) torch.float64 on cpu",
    ),
    "coefficients dtype": (
        lambda ops: ops.scheduled_layer(**CONV, coefficients=torch.zeros(6), **WINDOW, **MOVING),
        "coefficients is (6,) torch.float32 on cpu, expected (6,) torch.float64 on cpu",
    ),
    "positions": (
        lambda ops: ops.scheduled_layer(
            **LINEAR, **EMPTY, coefficients=torch.zeros(6).double(), **{**MOVING, "positions": 0}
        ),
        "positions is 0, expected 1 or more",
    ),
    "scheduled samples": (
        lambda ops: ops.scheduled_layer(
            **LINEAR, **EMPTY, coefficients=torch.zeros(6).double(), **{**MOVING, "samples": 3}
        ),
        "samples is 3, expected 0 (all) to 2",
    ),
}  # fmt: skip
MOVING = {"center": False, "samples": 0, "positions": 1}
WINDOW = {
    "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "transposed": False, "output_padding": (0, 0), "groups": 1
}  # fmt: skip
EMPTY = dict(zip(WINDOW, to_arguments(LINEAR_GEOMETRY), strict=True))


@pytest.mark.parametrize("case", OPS)
def test_op(case):
    call, message = OPS[case]
    refuses(lambda: call(torch.ops.pyfeedback), message)


def test_a_coefficient_that_is_not_finite_is_refused_when_the_scheduled_backward_reads_it():
    leaves = {name: t.clone().requires_grad_() for name, t in LINEAR.items()}
    coefficients = torch.tensor([0, float("nan"), 0, 0, 0, 0], dtype=torch.float64)
    loss = torch.ops.pyfeedback.scheduled_layer(**leaves, **EMPTY, coefficients=coefficients, **MOVING).sum()
    refuses(loss.backward, "amp is nan, expected a finite number")


def test_meta_tensors_have_shapes():
    for function, good in GOOD.items():
        meta = {name: t.to("meta").requires_grad_() for name, t in good.items()}
        expected = getattr(functional, function)(**good, amp=1.0)
        for ops in (functional, torch.ops.pyfeedback):
            sizes = () if function != "fa_convolution" or ops is functional else ((1,), (0,), (1,), False, (0,), 1)
            output = getattr(ops, function)(*meta.values(), *sizes, amp=1.0)
            assert (output.shape, output.device.type) == (expected.shape, "meta")
            output.sum().backward()
        assert all(t.grad.shape == t.shape for t in meta.values())


# Layers

LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (2, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 6, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("rule", ["bp", "ia", "dfa"])
@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_accepts_only_tensors(name, kind, rule):
    make, shape = LAYERS[name]
    layer, (value, shown) = pyfeedback.convert(make(), rule), NO_TENSORS[kind]
    layer(torch.randn(shape))
    refuses(lambda: layer(value), f"input is {shown}, expected a tensor")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_accepts_only_floats(name, dtype):
    make, shape = LAYERS[name]
    layer = pyfeedback.convert(make(), "ia")
    refuses(lambda: layer(torch.ones(shape).to(dtype)), f"input has dtype {dtype}, expected float64, float32")


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_checks_the_channels_of_its_input(name):
    make, shape = LAYERS[name]
    layer = pyfeedback.convert(make(), "ia")
    refuses(lambda: layer(torch.randn(shape[0], 5, *shape[2:])), "input has 5 channels, shape")


ATTRIBUTES = {
    "stride": ({"stride": 1.5}, "stride is (1.5, 1.5), expected ints"),
    "dilation": ({"dilation": None}, "dilation is None, expected ints"),
    "padding": ({"padding": -1}, "padding is (-1, -1), expected 0 or more"),
}


@pytest.mark.parametrize("case", ATTRIBUTES)
def test_arguments_that_torch_nn_does_not_check(case):
    options, message = ATTRIBUTES[case]
    layer = pyfeedback.nn.Conv2d(4, 6, 3, **options, rule="ia")
    refuses(lambda: layer(torch.randn(2, 4, 6, 6)), message)


CONSTRUCTORS = {
    "linear": lambda **options: pyfeedback.nn.Linear(4, 6, **options),
    "conv2d": lambda **options: pyfeedback.nn.Conv2d(4, 6, 3, **options),
    "transposed": lambda **options: pyfeedback.nn.ConvTranspose1d(4, 6, 3, **options),
    "attention": lambda **options: pyfeedback.nn.MultiheadAttention(4, 2, **options),
}


@pytest.mark.parametrize("make", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_rule_and_init_of_a_layer(make):
    for value, shown in (
        (3, "3"),
        (None, "None"),
        ("xy", "'xy'"),
        ([], "a list"),
        (torch.ones(2), "a tensor of shape ("),
    ):
        refuses(lambda value=value: make(rule=value), f"rule is {shown}")
    for value, shown in ((3, "3"), ("normal", "'normal'"), (torch.ones(2), "a tensor of shape (2,)"), ([], "a list")):
        refuses(lambda value=value: make(init=value), f"init is {shown}, expected a pyfeedback.Init")
