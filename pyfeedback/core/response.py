"""Whether the backward of a centered rule may read the output of a layer with a bias in place of its response.

In exact arithmetic, centering removes the bias. In rounded arithmetic, the sum of response and bias is rounded once
more, by about as much as the response itself if the bias is no larger. Otherwise, the response is computed again.
"""

from torch import Tensor

from pyfeedback.core.algorithm import pass_macs
from pyfeedback.core.geometry import Geometry
from pyfeedback.core.tensors import acc_dtype

FEWEST_ELEMENTS = 2**12  # of the output of a layer for which the comparison pays
FEWEST_MACS = 2**22
FEWEST_MACS_PER_ELEMENT = 64


def is_costly(geometry: Geometry, output: Tensor, input: Tensor, weight: Tensor, samples: int) -> bool:
    """Whether computing the response of the samples again takes several times as long as comparing it with the bias.

    False if the comparison would synchronize a device, and in 16 bits, in which the sum loses the response's own bits.
    """
    elements, plain = output.numel(), type(output) is Tensor and output.is_cpu
    if elements < FEWEST_ELEMENTS or not plain or output.dtype is not acc_dtype(output.dtype):
        return False
    macs = pass_macs(geometry.sizes(input.shape, weight.shape, samples))
    return macs >= max(FEWEST_MACS, FEWEST_MACS_PER_ELEMENT * elements)


def exceeds_bias(output: Tensor, bias: Tensor, channel: int) -> bool:
    """Whether the root mean square of the response is at least as large as the bias, in every channel.

    It is if that of the output is twice as large.
    """
    others = [d for d in range(output.dim()) if d != channel % output.dim()]
    count = output.numel() // max(1, bias.numel())
    return bool((output.square().sum(others) >= bias.square().mul_(4 * count)).all())
