"""Lower bounds on the cost of a layer's step: the rule's multiply-adds, and each tensor moved once."""

import math

import torch

from pyfeedback import Rule
from pyfeedback.testing import ConvShape

BACKPROP_PASSES = 3  # fprop, dgrad, wgrad


def sampled(rule: Rule, batch: int) -> float:
    """The fraction of the batch that the rule's data terms see."""
    samples = rule.coefficients(batch, 1).samples
    return samples / batch if samples else 1.0


def rule_passes(rule: Rule) -> int:
    """Extra passes over the batch for the data terms, by definition of the primitives. amp alone costs one pass."""
    return max(2 * (rule.null != 0) + 2 * (rule.sparse != 0), int(rule.amp != 0))


def flops(shape: ConvShape, rule: Rule, batch: int, backward_only: bool = False) -> int:
    """Floating-point operations of a step, by the definition of the rule rather than by the algorithm used."""
    passes = BACKPROP_PASSES - backward_only + rule_passes(rule) * sampled(rule, batch)
    return int(2 * shape.macs * batch * passes)


def minimum_bytes(shape: ConvShape, rule: Rule, batch: int, dtype: torch.dtype, backward_only: bool = False) -> int:
    """Bytes moved by a step whose forward and backward passes read and write every tensor once each."""
    x = batch * shape.in_channels * shape.map_size**2
    w = shape.out_channels * (shape.in_channels // shape.groups) * shape.kernel**2
    sizes = (batch, shape.in_channels, *2 * [shape.map_size]), (shape.out_channels, 0, *2 * [shape.kernel])
    y = math.prod(shape.geometry.output_shape(*sizes))
    response = y * sampled(rule, batch) if rule.reads_data else 0
    return int(elements_moved(x, w, y, rule, response, backward_only) * dtype.itemsize)


def elements_moved(x: int, w: int, y: int, rule: Rule, response: float, backward_only: bool = False) -> float:
    """Elements read and written, for those of the input, the weight, the output, and the response that is read."""
    forward = x + w + y
    backward = (y + x + w) + (x + w)  # grad_output, input, feedback; grad_input, grad_weight
    if rule.learns:
        backward += w  # its gradient
        backward += w * (rule.self_ != 0 or rule.reads_data)  # the weight
        backward += response
    return backward + (0 if backward_only else forward)
