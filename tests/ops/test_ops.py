"""Every op, coefficient and option against float64 autograd of the paper's regularizers."""

import itertools

import pytest
import torch
from cases import RULES, conv_tensors, fresh, gradients, laid_out, largest_error, random_conv

import pyfeedback
from pyfeedback import functional, reference

APIS = {"dispatcher": torch.ops.pyfeedback, "function": functional}
LINEAR_SIZES = [
    ((4, 6), 3), ((3, 5), 11), ((1, 4), 4), ((4, 3, 6), 9), ((2, 5, 8), 2), ((3, 2, 4, 6), 6), ((2, 1, 3, 2, 5), 4),
]  # fmt: skip


def run(op, tensors, options, rule, with_penalty=False):
    """Output and gradients for a fixed random output gradient. The regularizer of the reference is part of its loss."""
    output = op(*tensors, *options, **rule)
    output, penalty = output if with_penalty else (output, None)
    torch.manual_seed(1)
    grad_output = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    torch.autograd.backward([output], [grad_output], retain_graph=with_penalty)
    if with_penalty and penalty.requires_grad:
        penalty.backward()
    return [output.detach(), *gradients(tensors)]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("number", range(320))
def test_conv2d_against_reference(number, api):
    case = random_conv(number)
    name = list(RULES)[number % len(RULES)]
    rule = dict(RULES[name])
    if number % 4 == 1 and case.input[0] > 1:
        rule["samples"] = case.input[0] - 1
    tensors = conv_tensors(case, number)
    if number % 7 == 0:
        tensors[0].requires_grad_(False)
    ours = run(APIS[api].fa_conv2d, fresh_like(tensors), case.window, rule)
    oracle = run(reference.conv2d, fresh_like(tensors), case.window, rule, with_penalty=True)
    assert largest_error(ours, oracle) < 1e-12, (case, name)


def fresh_like(tensors):
    """New leaves with the memory layout and requires_grad of the originals."""
    again = []
    for t in tensors:
        keeps_layout = t is None or t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)
        copy = t if t is None else t.detach().clone() if keeps_layout else laid_out(t.detach().contiguous(), "sliced")
        again.append(copy if copy is None else copy.requires_grad_(t.requires_grad))
    return again


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("size", "out"), LINEAR_SIZES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear_against_reference(size, out, bias, rule):
    torch.manual_seed(0)
    shapes = [size, (out, size[-1]), (out, size[-1])] + ([(out,)] if bias else [])
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    for samples in {0, size[0] - 1}:
        options = {**RULES[rule], "samples": samples}
        oracle = run(reference.linear, fresh(tensors), (), options, with_penalty=True)
        for op in (functional.fa_linear, torch.ops.pyfeedback.fa_linear):
            assert largest_error(run(op, fresh(tensors), (), options), oracle) < 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("number", [1, 2, 3, 6, 12])
def test_backward_op_alone(number, rule):
    """The gradients are the same with and without the response, and None where the mask excludes them."""
    case = random_conv(number)
    x, w, b, _ = (t if t is None else t.detach() for t in conv_tensors(case, number))
    response = torch.conv2d(x, w, None, *case.window)
    grad_output = torch.randn_like(response)
    op = torch.ops.pyfeedback.fa_conv2d_backward
    full = op(grad_output, x, w, b, None, *case.window, **RULES[rule])
    for mask in itertools.product((True, False), repeat=4):
        part = op(grad_output, x, w, b, response, *case.window, **RULES[rule], output_mask=list(mask))
        for needed, value, whole in zip(mask, part, full, strict=True):
            assert (value is not None) == needed
            if needed:
                torch.testing.assert_close(value, whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_have_the_layout_of_their_tensors(layout, rule):
    memory_format = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    for kernel, stride in ((3, 1), (1, 1), (1, 2)):
        x = laid_out(torch.randn(3, 4, 7, 6), layout).requires_grad_()
        w, b = (laid_out(torch.randn(5, 4, kernel, kernel), layout).requires_grad_() for _ in range(2))
        functional.fa_conv2d(x, w, b, stride=stride, **RULES[rule]).sum().backward()
        for tensor in (x, w, b):
            assert tensor.grad.is_contiguous(memory_format=memory_format)
            assert tensor.grad.stride() == tensor.stride()


@pytest.mark.parametrize("api", APIS)
def test_forward_is_torchs_bit_for_bit(api):
    for number in range(40):
        case = random_conv(number)
        x, w, b, bias = conv_tensors(case, number, torch.float32)
        with pyfeedback.backend("composite"):
            ours = APIS[api].fa_conv2d(x, w, b, bias, *case.window, amp=0.1, null=0.1)
        assert torch.equal(ours, torch.conv2d(x, w, bias, *case.window))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("api", APIS)
def test_empty_batch(api, rule):
    x = torch.randn(0, 4, 6, 6, requires_grad=True)
    w, b = (torch.randn(5, 4, 3, 3, requires_grad=True) for _ in range(2))
    bias = torch.randn(5, requires_grad=True)
    output = APIS[api].fa_conv2d(x, w, b, bias, padding=1, **RULES[rule])
    assert output.shape == (0, 5, 6, 6)
    output.sum().backward()
    for tensor in (x, w, bias) if rule == "fa" else (x, w, b, bias):
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()
    x = torch.randn(0, 3, 4, requires_grad=True)
    w, b = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    APIS[api].fa_linear(x, w, b, **RULES[rule]).sum().backward()
    assert x.grad.shape == x.shape
    assert not w.grad.any()
    assert rule == "fa" or not b.grad.any()


def test_no_work_for_a_feedback_without_gradient(monkeypatch):
    from pyfeedback.backends.composite import layer

    def never(*args):
        raise AssertionError("the rule's gradient was computed")

    monkeypatch.setattr(layer, "_feedback_gradient", never)
    x, w, b = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, 3, 3, 3)
    for op in (functional.fa_conv2d, torch.ops.pyfeedback.fa_conv2d):
        op(x, w, b, amp=0.1, null=0.1, tie=1.0).sum().backward()
    assert w.grad.abs().sum() > 0


def test_gradients_are_derivatives_where_feedback_is_the_weight():
    torch.manual_seed(0)
    x, w, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 5, 6), (6, 2, 3, 2), (6,)))
    for api, window in itertools.product(APIS.values(), [(1, 1, 1, 2), ((2, 1), (1, 0), (1, 2), 2)]):
        torch.autograd.gradcheck(at_the_weight(api.fa_conv2d, *window), (x, w, bias))
    x, w, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 4), (5, 4), (5,)))
    for api in APIS.values():
        torch.autograd.gradcheck(at_the_weight(api.fa_linear), (x, w, bias))


def at_the_weight(op, *window):
    return lambda x, w, bias: op(x, w, w.detach().clone(), bias, *window)


@pytest.mark.parametrize("op", ["fa_conv2d", "fa_linear"])
@pytest.mark.parametrize("api", APIS)
def test_double_backward_raises(api, op):
    size = (3, 3) if op == "fa_conv2d" else ()
    x = torch.randn(2, 4, *size[:1] * 2, requires_grad=True)
    w, b = (torch.randn(5, 4, *size, requires_grad=True) for _ in range(2))
    output = getattr(APIS[api], op)(x, w, b, amp=0.1)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(output.square().sum(), x, create_graph=True)


def test_strided_pointwise_weight_gradient_does_not_crash():
    """nn.Conv2d(8, 4, 1, stride=3) of torch 2.13 corrupts the heap on a CPU within 300 backward calls."""
    x = torch.randn(3, 8, 15, 12).to(memory_format=torch.channels_last).requires_grad_()
    w, b = (torch.randn(4, 8, 1, 1, requires_grad=True) for _ in range(2))
    for _ in range(400):
        functional.fa_conv2d(x, w, b, stride=3, amp=0.1, null=0.1).sum().backward()
    assert w.grad.isfinite().all()


def test_deterministic_algorithms():
    case = random_conv(8)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            run(functional.fa_conv2d, conv_tensors(case, 8, torch.float32), case.window, RULES["everything"])
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layouts", [(0, 1, 0), (1, 0, 1), (0, 0, 1)], ids=str)
def test_gradients_of_the_op_have_the_layout_of_their_tensors(layouts):
    """Autograd would restride the gradient of a leaf, so the test calls the backward op directly."""
    formats = (torch.contiguous_format, torch.channels_last)
    shapes = ((2, 4, 5, 6), (8, 4, 3, 3), (8, 4, 3, 3))
    x, w, b = (torch.randn(s).to(memory_format=formats[i]) for s, i in zip(shapes, layouts, strict=True))
    grad_output = torch.randn(2, 8, 3, 4)
    backward = torch.ops.pyfeedback.fa_conv2d_backward
    for channels_last in formats:
        grads = backward(grad_output.to(memory_format=channels_last), x, w, b, None, amp=0.5, null=0.5)
        for grad, like in zip(grads, (x, w, w), strict=False):
            assert grad.stride() == like.stride()


def test_regulariser_is_the_old_name_of_regularizer():
    message = r"^reference\.regulariser is now reference\.regularizer; the old name"
    with pytest.warns(DeprecationWarning, match=message) as warned:
        assert reference.regulariser is reference.regularizer
    assert warned[0].filename == __file__
    with pytest.raises(AttributeError, match=r"module 'pyfeedback\.reference' has no attribute 'regularised'"):
        _ = reference.regularised
