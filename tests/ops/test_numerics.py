"""Rounding: in every dtype, the error is at most twice that of the same computation in plain PyTorch.

`make test` also runs these tests with ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2, because the order of a sum
depends on the instruction set.
"""

from collections import defaultdict

import pytest
import torch
from cases import RULES, conv_tensors, fresh, gradients, norm_error, percentile, random_conv

from pyfeedback import functional, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # float64 is the dtype of the oracle; see test_ops
NAMES = ("output", "grad_input", "grad_weight", "grad_feedback", "grad_bias")


def ratio(ours, plain, exact):
    """The ratio of our error to PyTorch's, both relative to |exact|, beyond one unit in the last place."""
    unit = torch.finfo(ours.dtype).eps
    return max(0.0, norm_error(ours, exact) - unit) / max(norm_error(plain, exact), unit / 8)


def steps(case, number, rule, dtype):
    """Output and gradients of pyfeedback and of plain PyTorch in ``dtype``, and in float64 for the same values."""
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


def assert_at_most_twice(ratios):
    """The 95th percentile of the ratios of our error to PyTorch's over many draws, since one draw says little."""
    assert len(ratios) >= 40
    assert percentile(ratios, 95) <= 2, sorted(ratios)[-5:]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("rule", RULES)
def test_error_at_most_twice_pytorchs(rule, dtype):
    ratios = defaultdict(list)
    for number in range(40, 84):
        case = random_conv(number)
        results = zip(NAMES, *steps(case, number, RULES[rule], dtype), strict=False)
        for name, ours, plain, exact in results:
            ratios[name].append(ratio(ours, plain, exact))
    for name in NAMES[:4]:
        assert_at_most_twice(ratios[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("rule", ["wm", "wm-centered", "ia", "ia-centered", "aa", "aa-centered"])
@pytest.mark.parametrize(("c", "k", "kernel"), [(32, 64, 1), (64, 16, 1), (16, 16, 3)], ids=str)
def test_error_at_the_size_of_a_layer(c, k, kernel, rule, dtype):
    """Half-normal inputs, as after a ReLU, so that centering matters."""
    ratios = []
    for seed in range(40):
        torch.manual_seed(seed)
        x = torch.randn(8, c, 12, 12).relu_().contiguous(memory_format=torch.channels_last)
        w, b = (torch.randn(k, c, kernel, kernel) / (c * kernel**2) ** 0.5 for _ in range(2))
        x, w, b = (t.to(dtype) for t in (x, w, b))
        y = torch.conv2d(x, w, padding=kernel // 2)
        ops = torch.ops.pyfeedback
        ours = ops.fa_conv2d_backward(
            y, x, w, b, y, padding=kernel // 2, **RULES[rule], output_mask=[False, False, True, False]
        )[2]
        plain, exact = (rule_gradient(x, w, b, kernel // 2, rule, wide) for wide in (dtype, torch.float64))
        ratios.append(ratio(ours, plain, exact))
    assert_at_most_twice(ratios)


def rule_gradient(x, w, b, padding, rule, dtype):
    """The gradient of the rule by the reference in ``dtype``."""
    feedback = b.to(dtype, copy=True).requires_grad_()
    reference.conv2d(x.to(dtype), w.to(dtype), feedback, padding=padding, **RULES[rule])[1].backward()
    return feedback.grad


@pytest.mark.parametrize("kernel", [1, 3])
def test_activation_alignment_near_its_goal_in_bfloat16(kernel):
    """With |B - W| / |W| = 1 %, the gradient is accurate to 1 %. The difference of two responses would not be."""
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
