"""The native ops by implementation, all under one name and for CPU tensors, so that one set of value tests serves all:
the CPU kernels, the CUDA kernels run on the CPU (simt), and the CUDA kernels on a device.
"""

import pytest
import simt
import torch

from pyfeedback.backends.extension import loading

DEVICE = "cuda"


class OnDevice:
    """Copies the operands to the device, and back what was written."""

    @staticmethod
    def native_feedback_step_(feedback, weight, grad, momentum_buffer, *, dynamic=None, **options):
        copies = {id(t): _to_device(t) for t in (*feedback, *weight, *grad, *momentum_buffer)}  # one of what is shared
        there = [[copies[id(t)] for t in tensors] for tensors in (feedback, weight, grad, momentum_buffer)]
        dynamic = None if dynamic is None else dynamic.to(DEVICE)
        torch.ops.pyfeedback.native_feedback_step_(*there, **options, dynamic=dynamic)
        for tensor, stepped in zip((*feedback, *momentum_buffer), (*there[0], *there[3]), strict=True):
            tensor.copy_(stepped)

    @staticmethod
    def native_alignment_products(feedback, weight):
        there = [[_to_device(t) for t in tensors] for tensors in (feedback, weight)]
        return torch.ops.pyfeedback.native_alignment_products(*there).cpu()

    @staticmethod
    def native_center(input, samples):
        return torch.ops.pyfeedback.native_center(_to_device(input), samples).cpu()

    @staticmethod
    def native_add_centered_(self, input, beta, alpha):
        there = _to_device(self)
        torch.ops.pyfeedback.native_add_centered_(there, _to_device(input), beta, alpha)
        self.copy_(there)


def _to_device(tensor):
    """With the strides, and the place within sixteen bytes, that it has here."""
    if tensor.numel() == 0:
        return tensor.to(DEVICE)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr() % 16 // tensor.element_size()
    storage = torch.empty(start + reach, dtype=tensor.dtype, device=DEVICE)
    storage[start:].copy_(tensor.as_strided((reach,), (1,)))
    return storage.as_strided(tensor.shape, tensor.stride(), start)


IMPLEMENTATIONS = {"cpu": torch.ops.pyfeedback, "simt": simt, "cuda": OnDevice}
PARAMETERS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not loading.has_cpu(), reason="the CPU library is not built")),
    pytest.param("simt", marks=pytest.mark.skipif(simt.COMPILER is None, reason="no C++ compiler")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
