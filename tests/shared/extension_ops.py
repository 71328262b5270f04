"""The compiled ops by implementation and what their tests share.

All implementations have the names of the ops and take CPU tensors, so that the same tests judge the CPU kernels, the
CUDA kernels on the CPU (cuda_emulator) and the CUDA kernels on a device. The rule everywhere: the error is at most
twice that of the same formula in plain torch in the dtype of the tensor, plus one unit in the last place of the largest
value; four in float64, where the formula that judges rounds as much itself.
"""

import cuda_emulator
import pytest
import torch

from pyfeedback.backends.extension import loading

DEVICE = "cuda"


class OnDevice:
    """Copies the operands to the device, and back what was written."""

    @staticmethod
    def extension_feedback_step_(feedback, weight, grad, momentum_buffer, *, dynamic=None, **options):
        copies = {id(t): _to_device(t) for t in (*feedback, *weight, *grad, *momentum_buffer)}  # one of what is shared
        there = [[copies[id(t)] for t in tensors] for tensors in (feedback, weight, grad, momentum_buffer)]
        dynamic = None if dynamic is None else dynamic.to(DEVICE)
        torch.ops.pyfeedback.extension_feedback_step_(*there, **options, dynamic=dynamic)
        for tensor, stepped in zip((*feedback, *momentum_buffer), (*there[0], *there[3]), strict=True):
            tensor.copy_(stepped)

    @staticmethod
    def extension_alignment_products(feedback, weight):
        there = [[_to_device(t) for t in tensors] for tensors in (feedback, weight)]
        return torch.ops.pyfeedback.extension_alignment_products(*there).cpu()

    @staticmethod
    def extension_center(input, samples):
        return torch.ops.pyfeedback.extension_center(_to_device(input), samples).cpu()

    @staticmethod
    def extension_add_centered_(self, input, beta, alpha):
        there = _to_device(self)
        torch.ops.pyfeedback.extension_add_centered_(there, _to_device(input), beta, alpha)
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


IMPLEMENTATIONS = {"cpu": torch.ops.pyfeedback, "cuda_emulator": cuda_emulator, "cuda": OnDevice}
PARAMETERS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not loading.has_cpu(), reason="the CPU library is not built")),
    pytest.param("cuda_emulator", marks=pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="no C++ compiler")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]

cpu = pytest.mark.skipif(not loading.has_cpu(), reason="the CPU library is not built")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = {"decay": 0.1, "self_": 0.2, "tie": 0.3, "lr": 0.5, "momentum": 0.9}
SIZES = [(0,), (), (1,), (7,), (3, 5), (33, 1, 7), (4, 6, 3, 3), (8, 3, 5, 7), (40000,)]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def assert_as_accurate(actual, composed, oracle, scale=None):
    """`actual` against the float64 `oracle`; `composed` is plain torch in the dtype of `actual`, `scale` the largest
    value that took part, by default the largest of the oracle."""
    assert actual.shape == oracle.shape
    if oracle.numel() == 0:
        return
    own = (composed.double() - oracle).abs().max()
    ulps = 4 if actual.dtype == torch.float64 else 1
    floor = ulps * torch.finfo(actual.dtype).eps * (oracle if scale is None else scale).abs().max()
    error = (actual.double() - oracle).abs().max()
    assert error <= 2 * own + floor, f"error {error:.3g}, plain torch {own:.3g}, floor {floor:.3g}"


def step_formula(
    feedback, weight, grad, buffer, *, decay, self_, tie, lr, momentum=0.0, nesterov=False, noise=0.0, seed=0
):
    """(feedback, momentum buffer) after one step of one tensor, out of place and in the dtype given."""
    gradient = decay * feedback
    if self_:
        gradient = gradient - self_ * weight
    if tie:
        gradient = gradient + tie * grad
    if buffer is None:
        return feedback - lr * gradient, None
    buffer = momentum * buffer + gradient
    direction = gradient + momentum * buffer if nesterov else buffer
    return feedback - lr * direction, buffer


def random_like_model(shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def extension_step(ops, feedback, weight, grad, buffers, **keywords):
    """The op on copies; per-tensor coefficients may be given as one number. Returns (feedback, buffers)."""
    feedback = [tensor.clone() for tensor in feedback]
    buffers = [tensor.clone() for tensor in buffers]
    for name in ("decay", "self_", "tie"):
        value = keywords.get(name, 0.0)
        keywords[name] = list(value) if isinstance(value, (list, tuple)) else [value] * len(feedback)
    ops.extension_feedback_step_(feedback, weight, grad, buffers, **keywords)
    return feedback, buffers


def check_step(ops, feedback, weight, grad, buffers, **keywords):
    """One compiled step of a model against the formula, tensor by tensor."""
    stepped, stepped_buffers = extension_step(ops, feedback, weight, grad, buffers, **keywords)
    for i, start in enumerate(feedback):
        operands = [start, *(list_[i] if list_ else None for list_ in (weight, grad, buffers))]
        own = {name: value[i] if isinstance(value, list) else value for name, value in keywords.items()}
        own = {"decay": 0.0, "self_": 0.0, "tie": 0.0, **own}
        composed, composed_buffer = step_formula(*operands, **own)
        oracle, oracle_buffer = step_formula(*(t if t is None else t.double() for t in operands), **own)
        assert_as_accurate(stepped[i], composed, oracle)
        assert stepped[i].stride() == start.stride()
        if buffers:
            assert_as_accurate(stepped_buffers[i], composed_buffer, oracle_buffer)
