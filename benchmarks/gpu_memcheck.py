"""Run every kernel of csrc/ and kernels/ on awkward sizes under compute-sanitizer.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 python benchmarks/gpu_memcheck.py
"""

import argparse
import itertools

import torch

import pyfeedback

SIZES = [(1,), (3,), (64,), (257,), (1023,), (5, 7), (16, 3, 3, 3), (8, 5, 1, 1), (65537,), (0,)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def draw(dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Tensors of every size: one in channels_last, one that is not dense, and one that starts at an odd element."""
    tensors = [torch.randn(size, device=device).to(dtype) for size in SIZES]
    tensors.append(torch.randn(4, 6, 3, 3, device=device).to(dtype, memory_format=torch.channels_last))
    tensors.append(torch.randn(9, 14, device=device).to(dtype)[:, ::2])
    tensors.append(torch.randn(5001, device=device).to(dtype)[1:])
    return tensors


def step(dtype: torch.dtype, device: torch.device, momentum: float, noise: float, skip_nonfinite: bool) -> None:
    """One feedback update of these tensors."""
    feedback, weight, grad, buffers = (draw(dtype, device) for _ in range(4))
    count = len(feedback)
    pyfeedback.functional.feedback_step_(
        feedback, weight, grad, buffers if momentum else [],
        decay=[0.1] * count, self_=[0.2] * count, tie=[0.3] * count,
        lr=0.1, momentum=momentum, nesterov=bool(momentum), noise=noise, seed=7, skip_nonfinite=skip_nonfinite,
    )  # fmt: skip
    assert all(t.isfinite().all() for t in feedback)


def alignment(dtype: torch.dtype, device: torch.device) -> None:
    """The products of pairs, some with different layouts, against torch."""
    feedback, weight = draw(dtype, device), draw(dtype, device)
    weight[5] = weight[5].t().contiguous().t()
    found = torch.ops.pyfeedback.extension_alignment_products(feedback, weight)
    expected = [(b.double() * w.double()).sum() for b, w in zip(feedback, weight, strict=True)]
    torch.testing.assert_close(found[:, 2], torch.stack(expected), rtol=1e-9, atol=1e-9)


def center(dtype: torch.dtype, device: torch.device) -> None:
    """Means over the samples of maps with ragged sizes, in both memory formats, against torch."""
    for size, memory_format in itertools.product(
        [(1, 3, 5, 5), (7, 5, 3, 9), (4, 64, 7, 7)], (torch.contiguous_format, torch.channels_last)
    ):
        x = torch.randn(size, device=device).to(dtype, memory_format=memory_format)
        for samples in (1, size[0]):
            found = torch.ops.pyfeedback.center(x, samples)
            wide = x[:samples].double()
            expected = wide - wide.mean(0)
            torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


def fused(device: torch.device) -> None:
    """The backward pass of ragged layers by the Triton kernels; one layer uses split-K."""
    for size, weight, window in [
        ((3, 17, 7, 5), (19, 17, 3, 3), ((2, 2), (1, 1))),
        ((2, 16, 40, 40), (24, 16, 1, 1), ((1, 1), (0, 0))),
        ((1, 33, 9, 9), (16, 33, 5, 5), ((3, 3), (2, 2))),
    ]:
        for rule in (
            {},
            {"amp": 0.5, "decay": 0.1},
            {"amp": 0.5, "null": 0.5},
            {"amp": 0.5, "sparse": 0.5, "tie": 1.0},
        ):
            x, w, b = (torch.randn(s, device=device, dtype=torch.float16) for s in (size, weight, weight))
            x, w, b = (t.mul(0.1).requires_grad_() for t in (x, w, b))
            pyfeedback.functional.fa_conv2d(x, w, b, None, *window, **rule).square().sum().backward()
            assert all(t.grad.isfinite().all() for t in (x, w, b) if t.grad is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    with pyfeedback.backend("extension"):
        for dtype in DTYPES:
            alignment(dtype, device)
            center(dtype, device)
            for momentum, noise, skip in itertools.product((0.0, 0.9), (0.0, 0.01), (False, True)):
                step(dtype, device, momentum, noise, skip)
    if device.type == "cuda":
        for name in ("triton", "triton-unfused"):
            with pyfeedback.backend(name):
                fused(device)
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
