"""The bias gradient of transposed convolutions is bit for bit that of torch, including its rounding and overflow.

It is a sum over batch and positions, with the error of a sum in its dtype. If the exact sum is near zero or beyond the
range of float16, the relative error is unbounded, so an exact match with torch is the useful test.
"""

from functools import partial

import pytest
import torch
from layer_cases import random_convolution
from torch.nn import functional as F

from pyfeedback import functional

CONVOLUTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
TRANSPOSED = [number for number in range(1, 240, 2) if number % 3 == 2] + [1, 3, 7, 9, 13, 15]  # mostly 3-D
SCALES = {"ordinary": lambda g: g, "overflowing": lambda g: 6e4 * g.sign(), "canceling": lambda g: g - g.mean()}


def with_its_own_weight(window, input, weight, bias):
    """Our layer with its weight as feedback."""
    return functional.fa_convolution(input, weight, weight.detach(), bias, *window)


def plain(convolve, window, input, weight, bias):
    return convolve(input, weight, bias, *window)


def gradients(convolve, tensors, scale):
    leaves = [t.clone().requires_grad_() for t in tensors]
    output = convolve(*leaves)
    torch.manual_seed(1)
    output.backward(scale(torch.randn(output.shape)).to(output.dtype))
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_torchs(dtype, scale):
    seen = set()
    for number in TRANSPOSED:
        size, weight, _, (stride, padding, dilation, transposed, extra, groups) = random_convolution(number)
        assert transposed
        torch.manual_seed(number)
        tensors = [torch.randn(s).to(dtype) for s in (size, weight, (weight[1] * groups,))]

        window = (stride, padding, dilation, True, extra, groups)
        ours = gradients(partial(with_its_own_weight, window), tensors, SCALES[scale])
        theirs = partial(plain, CONVOLUTIONS[len(stride)], (stride, padding, extra, groups, dilation))
        for found, expected in zip(ours, gradients(theirs, tensors, SCALES[scale]), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        seen.add(len(stride))
    assert seen == {1, 2, 3}
