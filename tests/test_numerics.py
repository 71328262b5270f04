"""Rounding: in every dtype an error of at most twice that of plain PyTorch computing the same in the same dtype."""

import pytest
import torch
from cases import RULES, conv_tensors, fresh, gradients, largest_error, random_conv

from pyfeedback import functional, reference

# The floor below which errors are not compared: two units in the last place of the largest element. float64 is the
# oracle's own dtype: test_ops compares it directly.
FLOOR = {torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = list(FLOOR)


def steps(case, number, rule, dtype):
    """Output and gradients of this package and of plain PyTorch in ``dtype``, and of float64 on the same values."""
    rounded = conv_tensors(case, number, dtype)

    def step(op, tensors, with_penalty):
        output = op(*tensors, *case.window, **rule)
        output, penalty = output if with_penalty else (output, None)
        torch.manual_seed(1)
        grad_output = torch.randn(output.shape).to(dtype).to(output.dtype)
        torch.autograd.backward([output], [grad_output])
        if with_penalty and penalty.requires_grad:
            penalty.backward()
        return [output.detach(), *gradients(tensors)]

    ours = step(functional.fa_conv2d, fresh(rounded), False)
    plain = step(reference.conv2d, fresh(rounded), True)
    exact = step(reference.conv2d, fresh(rounded, torch.float64), True)
    return ours, plain, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("rule", RULES)
def test_error_at_most_twice_pytorchs(rule, dtype):
    for number in range(40, 70):
        case = random_conv(number)
        ours, plain, exact = steps(case, number, RULES[rule], dtype)
        names = ("output", "grad_input", "grad_weight", "grad_feedback", "grad_bias")
        for name, a, b, c in zip(names, ours, plain, exact, strict=False):
            bound = 2 * largest_error([b], [c]) + FLOOR[dtype]
            assert largest_error([a], [c]) <= bound, (name, number, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("rule", ["wm", "wm-centered", "ia", "ia-centered", "aa", "aa-centered"])
@pytest.mark.parametrize(("c", "k", "kernel"), [(32, 64, 1), (64, 16, 1), (16, 16, 3)], ids=str)
def test_error_at_the_size_of_a_layer(c, k, kernel, rule, dtype):
    """Half-normal inputs, as behind a ReLU, where centring has something to cancel."""
    torch.manual_seed(0)
    x = torch.randn(16, c, 12, 12).relu_().contiguous(memory_format=torch.channels_last)
    w, b = (torch.randn(k, c, kernel, kernel) / (c * kernel**2) ** 0.5 for _ in range(2))
    grad_output = torch.randn(16, k, 12, 12).to(dtype)
    rounded = [t.to(dtype) for t in (x, w, b)]
    grads = []
    for op, working in ((functional.fa_conv2d, dtype), (reference.conv2d, dtype), (reference.conv2d, torch.float64)):
        tensors = fresh(rounded, working)
        result = op(*tensors, padding=kernel // 2, **RULES[rule])
        outputs = list(result) if isinstance(result, tuple) else [result]
        torch.autograd.backward(outputs, [grad_output.to(working), None][: len(outputs)])
        grads.append(gradients(tensors))
    ours, plain, exact = grads
    for a, p, e in zip(ours, plain, exact, strict=True):
        assert largest_error([a], [e]) <= 2 * largest_error([p], [e]) + FLOOR[dtype]


@pytest.mark.parametrize("kernel", [1, 3])
def test_activation_alignment_near_its_goal_in_bfloat16(kernel):
    """With |B - W| / |W| = 1 %, the gradient is right to 1 %: the difference of two responses would lose it."""
    torch.manual_seed(0)
    x = torch.randn(8, 32, 14, 14, dtype=torch.bfloat16)
    w = torch.randn(64, 32, kernel, kernel)
    b = (w + 0.01 * torch.randn_like(w)).bfloat16().requires_grad_()
    w = w.bfloat16()
    functional.fa_conv2d(x, w, b, padding=kernel // 2, amp=0.5, sparse=0.5).sum().backward()
    exact = b.detach().double().requires_grad_()
    _, penalty = reference.conv2d(x.double(), w.double(), exact, padding=kernel // 2, amp=0.5, sparse=0.5)
    penalty.backward()
    error = (b.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 0.01


def test_nonfinite_activations_propagate():
    x = torch.randn(2, 3, 5, 5)
    x[0, 0, 0, 0] = float("inf")
    w, b = (torch.randn(4, 3, 3, 3, requires_grad=True) for _ in range(2))
    functional.fa_conv2d(x, w, b, amp=0.1).sum().backward()
    assert not b.grad.isfinite().all()
    assert not w.grad.isfinite().all()
