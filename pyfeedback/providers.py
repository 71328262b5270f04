"""The provider table: who computes an op on a device, chosen in this one place.

"aten" composes PyTorch's own kernels and always exists; "native" is the compiled library (csrc); "triton" are the fused
kernels of a whole backward (kernels), "triton-apart" the same without single passes and joint launches. Left to "auto"
an op takes the first provider of its row that is there. A row names only providers that were measured faster on that
device than those after it; "measured" is either triton for the layers in the device's own table, which
`kernels/measured.py` keeps, and "depthwise" is native for the layers that `pyfeedback/depthwise.py` names.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from pyfeedback import aten, depthwise, native, step_arguments
from pyfeedback.forms import Coefficients, Window, WindowNd
from pyfeedback.kernels import measured
from pyfeedback.values import check_choice

BACKENDS = ("auto", "aten", "native", "triton", "triton-apart")

_ops = torch.ops.pyfeedback


def _native_center(input: Tensor, samples: int) -> Tensor:
    """The compiled kernel wants every sample to be one dense block."""
    if input.is_contiguous() or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)):
        return _ops.native_center.default(input, samples)
    return aten.center(input, samples)


def _native_add_centered_(self: Tensor, input: Tensor, beta: float, alpha: float) -> None:
    """The compiled kernel wants the samples of both to be dense blocks that agree in their strides."""
    alike = self.stride() == input.stride()
    if alike and (self.is_contiguous() or (self.dim() == 4 and self.is_contiguous(memory_format=torch.channels_last))):
        _ops.native_add_centered_.default(self, input, beta, alpha)
    else:
        aten.add_centered_(self, input, beta, alpha)


def _aten_feedback_step_(feedback, weight, grad, momentum_buffer, **options) -> None:
    aten.feedback_step_(feedback, weight, grad, momentum_buffer, **options)


def _native_feedback_step_(feedback, weight, grad, momentum_buffer, *, decay, self_, tie, **options) -> None:
    """The kernel checks its tensors, in a fraction of the time, before it writes; what it refuses is looked at again
    for the one line that names it.
    """
    # Tensors cost as much to hand over as small ones cost to step, and numbers a quarter of that.
    factors = {"decay": _compact(decay), "self_": _compact(self_), "tie": _compact(tie)}
    read = weight if any(factors["self_"]) else [], grad if any(factors["tie"]) else []
    buffers = momentum_buffer if options["momentum"] else []
    try:
        if not {len(weight), len(grad), len(momentum_buffer)} <= {0, len(feedback)}:
            raise RuntimeError("lists differ in length")
        _ops.native_feedback_step_.default(feedback, *read, buffers, **factors, **options)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        coefficients = {"decay": decay, "self_": self_, "tie": tie}
        step_arguments.check_step_tensors(
            feedback, weight, grad, momentum_buffer, coefficients, options, options["dynamic"]
        )
        raise step_arguments.kernel_error(error) from None
    torch.autograd.graph.increment_version([*feedback, *buffers])  # of what no kernel of torch's has written


def _compact(values):
    """One number where all are the same."""
    return values[:1] if values.count(values[0]) == len(values) else values


def _native_adamw_step_(param, weight, grad, exp_avg, exp_avg_sq, max_exp_avg_sq=(), *, step, **options) -> None:
    """The kernel is the CPU's, and has no amsgrad; its errors as those of :func:`_native_feedback_step_`."""
    if max_exp_avg_sq or param[0].device.type != "cpu":
        aten.adamw_step_(param, weight, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step=step, **options)
        return
    weights = weight if any(options["self_"]) else []
    grads = grad if any(options["tie"]) else []
    try:
        _ops.native_adamw_step_.default(param, weights, grads, exp_avg, exp_avg_sq, step, **options)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        step_arguments.check_adamw_tensors(param, weight, grad, moments, step, options)
        raise step_arguments.kernel_error(error) from None
    torch.autograd.graph.increment_version([*param, *exp_avg, *exp_avg_sq, *step])


def _fused(op: str, path: str | None, *args):
    from pyfeedback import fused  # imports triton, which takes a second

    return getattr(fused, op)(*args, center=_center, path=path)


def _center(input: Tensor, samples: int) -> Tensor:
    return provide("center", input.device.type)(input, samples)


_IMPLEMENTATIONS: dict[tuple[str, str], Callable] = {
    ("conv2d_backward", "aten"): aten.conv2d_backward,
    ("convolution_backward", "aten"): aten.convolution_backward,
    ("conv2d_backward", "native"): depthwise.conv2d_backward,
    ("conv2d_backward", "depthwise"): partial(depthwise.conv2d_backward, only_faster=True),
    ("conv2d_backward", "triton"): partial(_fused, "conv2d_backward", "fused"),
    ("conv2d_backward", "triton-apart"): partial(_fused, "conv2d_backward", "unfused"),
    ("conv2d_backward", "measured"): partial(_fused, "conv2d_backward", None),
    ("linear_backward", "aten"): aten.linear_backward,
    ("linear_backward", "triton"): partial(_fused, "linear_backward", "fused"),
    ("linear_backward", "triton-apart"): partial(_fused, "linear_backward", "unfused"),
    ("linear_backward", "measured"): partial(_fused, "linear_backward", None),
    ("adamw_step_", "aten"): aten.adamw_step_,
    ("adamw_step_", "native"): _native_adamw_step_,
    ("add_centered_", "aten"): aten.add_centered_,
    ("add_centered_", "native"): _native_add_centered_,
    ("alignment_products", "aten"): aten.alignment_products,
    ("alignment_products", "native"): _ops.native_alignment_products.default,
    ("center", "aten"): aten.center,
    ("center", "native"): _native_center,
    ("feedback_step_", "aten"): _aten_feedback_step_,
    ("feedback_step_", "native"): _native_feedback_step_,
}

_TABLE: dict[tuple[str, str], tuple[str, ...]] = {
    ("adamw_step_", "cpu"): ("native", "aten"),
    ("add_centered_", "cpu"): ("native", "aten"),
    ("alignment_products", "cpu"): ("native", "aten"),
    ("center", "cpu"): ("native", "aten"),
    ("conv2d_backward", "cpu"): ("depthwise", "aten"),
    ("feedback_step_", "cpu"): ("native", "aten"),
    ("conv2d_backward", "cuda"): ("measured", "aten"),
    ("linear_backward", "cuda"): ("measured", "aten"),
    # The CUDA kernels of csrc have not been measured on any device: only backend("native") takes them.
}

_default = "auto"  # of the process
_here: ContextVar[str | None] = ContextVar("pyfeedback_backend", default=None)  # of the blocks that are open around us
_open: list[str] = []  # of the blocks that are open in any thread
_chosen: dict[tuple[str, str, str], Callable] = {}


def provide(op: str, device_type: str) -> Callable:
    """The implementation of ``op`` for tensors on a device of this type."""
    key = (op, device_type, current_backend())
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _IMPLEMENTATIONS[op, _choose(op, device_type)]
    return found


def saves_response(
    input: Tensor, weight: Tensor, bias: Tensor | None, window: Window | WindowNd | None, rule: Coefficients
) -> bool:
    """True where the backward of this layer will read the forward's output; ``window`` is None for a linear layer."""
    if window is None:
        return aten.linear_saves_response(input, weight, bias, rule)
    if isinstance(window, WindowNd):
        return aten.convolution_saves_response(input, weight, bias, window, rule)
    if window.groups > 1:
        chosen = _choose("conv2d_backward", input.device.type)
        if chosen in ("native", "depthwise") and depthwise.takes(input, weight, window, chosen == "depthwise"):
            return depthwise.saves_response(input, bias, rule)
    return aten.conv2d_saves_response(input, weight, bias, window, rule)


def current_backend() -> str:
    """The backend in force: that of the innermost ``backend`` block around, else that of ``set_backend``, or "auto"."""
    name = _here.get()
    if name is not None:
        return name
    return _default if not _open else _of_this_thread()


def _of_this_thread() -> str:
    """The backend outside of every block of this thread, while another thread has one open.

    A thread that Python did not start is autograd's own, where the backward pass of a compiled model runs for a GPU.
    Nothing there tells which forward it belongs to, so it takes the block that was opened last.
    """
    foreign = isinstance(threading.current_thread(), threading._DummyThread)
    return next(iter(_open[-1:]), _default) if foreign else _default


def set_backend(name: str) -> None:
    """Force a backend for the whole process, or return to "auto"; PYFEEDBACK_BACKEND sets the one at the start.

    A ``backend`` block goes before it.

    Raises:
        ValueError: the name is none of :data:`BACKENDS`.
        RuntimeError: "native" is asked for and the compiled library is not there; "triton", and triton is not, or
            neither a GPU nor Triton's interpreter (TRITON_INTERPRET=1, set before the first use) is.
    """
    global _default
    _check(name)
    _default = name
    _chosen.clear()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block: ``with pyfeedback.backend("aten"): ...``

    It holds for the forward passes of this thread, and for their backward passes wherever and whenever they run. Ops
    that the backend does not implement are composed of PyTorch's own.

    Raises: as :func:`set_backend`.
    """
    _check(name)
    _open.append(name)
    try:
        with in_force(name):
            yield
    finally:
        _open.remove(name)


@contextmanager
def in_force(name: str) -> Iterator[None]:
    """:func:`backend` for a backward pass: ``name`` was in force at its forward."""
    token = _here.set(name)
    try:
        yield
    finally:
        _here.reset(token)


def _check(name: str) -> None:
    check_choice("backend", name, BACKENDS)
    if name == "native" and not native.has_cpu():
        raise RuntimeError(f'backend is "native", expected a compiled library: {native.build_info().missing}')
    triton = name.startswith("triton")
    if triton and not find_spec("triton"):
        raise RuntimeError(f'backend is "{name}", expected triton to be installed')
    if triton and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f'backend is "{name}", expected a GPU, or TRITON_INTERPRET=1 for Triton\'s interpreter')


def _choose(op: str, device_type: str) -> str:
    forced = current_backend()
    preferred = _TABLE.get((op, device_type), ("aten",)) if forced == "auto" else (forced, "aten")
    return next(p for p in preferred if (op, p) in _IMPLEMENTATIONS and _is_there(p, op, device_type))


def _is_there(provider: str, op: str, device_type: str) -> bool:
    if provider in ("native", "depthwise"):
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
        leaf = "pyfeedback::native_" + ("depthwise_backward" if op == "conv2d_backward" else op)
        return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(leaf, key)
    if provider == "measured":
        return bool(measured.devices()) and find_spec("triton") is not None
    return True


set_backend(os.environ.get("PYFEEDBACK_BACKEND", "auto"))
