"""The choice of the implementation of each op.

"composite" composes PyTorch's own kernels and is always available. "extension" is the compiled library (csrc). "triton"
is the backward of a layer by the Triton kernels, and "triton-unfused" the same without one-pass and joint launches.
"im2col" is that of "composite" with weight gradients as matrix products, and "dense" one call of the compiled library,
for small layers.
Under "auto", a layer that :func:`pyfeedback.tune` has measured on this device uses what was fastest (`choices.py`).
Every other op uses the first available implementation in its row of `_FASTEST`. On a CPU, each was measured to be
faster than those after it. On a GPU, all layers are composed, and so are the gradients of rules that read probes.
"depthwise" is limited to the layers for which `backends/extension/depthwise.is_faster` holds.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from pyfeedback.backends import choices, triton
from pyfeedback.backends.choices import Choice, tables
from pyfeedback.backends.composite import alignment, center, im2col, layer, probes, steps
from pyfeedback.backends.extension import dense, depthwise, loading, ops
from pyfeedback.core.algorithm import Algorithm, algorithms, choose_algorithm, needs_response
from pyfeedback.core.call import Gradients, Implementations, LayerCall, Mask
from pyfeedback.core.coefficients import COEFFICIENTS, Coefficients
from pyfeedback.core.deprecation import warn_renamed
from pyfeedback.core.geometry import LINEAR, Geometry, Shape
from pyfeedback.core.probes import ProbeProblem
from pyfeedback.core.values import check_choice

BACKENDS = ("auto", "composite", "extension", "triton", "triton-unfused")
_RENAMED = {"aten": "composite", "native": "extension", "triton-apart": "triton-unfused"}


class LayerBackend(NamedTuple):
    """One implementation of a layer's backward."""

    backward: Callable[..., Gradients]
    implemented: frozenset[str]  # coefficients
    supports: Callable[..., bool] | None = None  # (geometry, input, weight, rule, algorithm); None: all layers
    reads_response: Callable[[Coefficients, str], bool] | None = None  # (rule, device type); None: as the algorithm
    needs_terms: bool = False  # whether it supports only layers with data terms


_LAYER_BACKENDS = {
    "composite": LayerBackend(layer.backward, layer.IMPLEMENTED),
    "im2col": LayerBackend(im2col.backward, layer.IMPLEMENTED, im2col.supports),
    "dense": LayerBackend(dense.backward, dense.IMPLEMENTED, dense.supports, dense.reads_response, needs_terms=True),
    "extension": LayerBackend(depthwise.backward, depthwise.IMPLEMENTED, depthwise.supports, depthwise.reads_response),
    "depthwise": LayerBackend(depthwise.backward, depthwise.IMPLEMENTED, depthwise.is_faster, depthwise.reads_response),
}
for _name, _fused in (("triton", True), ("triton-unfused", False)):
    _backward = partial(triton.layer_backward, fused=_fused)
    _LAYER_BACKENDS[_name] = LayerBackend(_backward, triton.IMPLEMENTED, triton.supports)

# Each of these is an op of its name and one with the prefix extension_. adamw_step_, alignment_products and
# probe_gradients are only the latter, because users do not call them.
_IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {
    "adamw_step_": {"composite": steps.adamw_step_, "extension": ops.adamw_step_},
    "add_centered_": {"composite": center.add_centered_, "extension": ops.add_centered_},
    "alignment_products": {"composite": alignment.alignment_products, "extension": ops.alignment_products},
    "center": {"composite": center.center, "extension": ops.center},
    "probe_gradients": {
        "composite": probes.probe_gradients,
        "extension": ops.probe_gradients,
        "triton": triton.probe_gradients,
    },
    "feedback_step_": {"composite": steps.feedback_step_, "extension": ops.feedback_step_},
}

# The CUDA kernels of csrc have not been measured on any device: only backend("extension") uses them.
_FASTEST: dict[tuple[str, str], tuple[str, ...]] = {
    **{(op, "cpu"): ("extension", "composite") for op in _IMPLEMENTATIONS},
    ("grouped layer", "cpu"): ("depthwise", "composite"),
    ("layer", "cpu"): ("dense", "composite"),
}
_LAYERS = {  # the implementations of each kind of layer
    "grouped layer": ("composite", "extension", "depthwise"),
    "layer": ("composite", "dense", "im2col", "triton", "triton-unfused"),
}

_NO_TERMS = Coefficients()

_default = "auto"  # set by set_backend
innermost: ContextVar[str | None] = ContextVar("pyfeedback_backend", default=None)  # set by the innermost block
open_blocks: list[str] = []  # set by the open blocks of all threads


@cache
def implementation(op: str, device_type: str, backend: str) -> Callable:
    """The implementation of ``op`` on a device of this type, for a backend."""
    return _IMPLEMENTATIONS[op][_choose(op, device_type, backend)]


def current_implementation(op: str, device_type: str) -> Callable:
    """The implementation of ``op`` on a device of this type, for the current backend."""
    return implementation(op, device_type, current_backend())


def probe_gradients(problems: Sequence[ProbeProblem], seed: int, step: int) -> list[Tensor]:
    """The gradient [G, K, d] of each problem, in the dtype of its feedback or wider.

    The current backend computes all problems that it supports together, and PyTorch's own kernels the others.
    """
    chosen: dict[Callable, list[int]] = {}
    for i, problem in enumerate(problems):
        compute = current_implementation("probe_gradients", problem.weight.device.type)
        if compute is triton.probe_gradients and not _supports_probes(problem):
            compute = probes.probe_gradients
        chosen.setdefault(compute, []).append(i)
    found: dict[int, Tensor] = {}
    for compute, places in chosen.items():
        found |= dict(zip(places, compute([problems[i] for i in places], seed, step), strict=True))
    return [found[i] for i in range(len(problems))]


def _supports_probes(problem: ProbeProblem) -> bool:
    """Whether the Triton kernels implement every coefficient of the rule, and these sizes."""
    names = (*COEFFICIENTS, "normalize")
    implemented = all(name in triton.PROBES_IMPLEMENTED for name in names if getattr(problem.rule, name))
    return implemented and triton.supports_probes(problem)


class Candidate(NamedTuple):
    """A layer backend on one device, with the functions that its backward calls."""

    backend: LayerBackend
    chosen: Implementations
    missing: tuple[str, ...]  # coefficients and options that it does not implement


def plan(
    geometry: Geometry,
    input: Tensor,
    weight: Tensor,
    rule: Coefficients,
    mask: Mask,
    response_saved: bool,
    backend: str | None = None,
    use_measured: bool = True,
) -> LayerCall:
    """Choose the algorithm and the kernels of a layer's backward.

    Args:
        mask: which gradients are needed: of input, weight, feedback and bias.
        response_saved: False if the backward would have to compute the response again.
        backend: the current one by default.
        use_measured: whether "auto" uses what was measured for this layer.

    Raises:
        NotImplementedError: no backend for this layer implements one of the coefficients.
    """
    device_type = "cpu" if input.is_cpu else input.device.type  # creating the string takes 5 microseconds
    # current_backend(), inlined: a Python call less for each layer.
    backend = backend or innermost.get() or (current_backend() if open_blocks else _default)
    algorithm, reads_response = Algorithm.NONE, False
    if mask[2] and input.shape[0]:
        try:
            algorithm, reads_response = _cached_algorithm(geometry, input.shape, weight.shape, rule, response_saved)
        except TypeError:  # symbolic sizes have no hash
            algorithm, reads_response = _algorithm(geometry, input.shape, weight.shape, rule, response_saved)
    if backend == "auto" and use_measured and tables[input.device]:
        call = _measured(geometry, input, weight, rule, mask, response_saved)
        if call is not None:
            return call
    for found, chosen, missing in _candidates(device_type, backend, geometry is not LINEAR and geometry.groups > 1):
        if missing and any(map(rule.__getattribute__, missing)):
            continue
        if found.supports is None or found.supports(geometry, input, weight, rule, algorithm):
            if found.reads_response is not None:
                reads_response = mask[2] and found.reads_response(rule, device_type)
            return LayerCall(geometry, rule, mask, algorithm, chosen, reads_response)
    # The last candidate is the composition, which supports every layer: `missing` is what PyTorch's kernels lack.
    name = next(name for name in missing if getattr(rule, name))
    raise NotImplementedError(f"{name} is {getattr(rule, name)}, expected 0: no backend of this layer implements it")


def _measured(
    geometry: Geometry, input: Tensor, weight: Tensor, rule: Coefficients, mask: Mask, response_saved: bool
) -> LayerCall | None:
    """The call that was measured to be the fastest; None if this layer was not measured.

    A compiled graph saves the response only if the choice for a layer that has it reads it. Without a response, a
    choice that does not read it is therefore used as well.
    """
    choice = choices.find(geometry, input, weight, rule, mask, response_saved)
    if choice is not None:
        return _call(choice, geometry, input, weight, rule, mask)
    choice = choices.find_unsaved(geometry, input, weight, rule, mask) if mask[2] and not response_saved else None
    call = choice and _call(choice, geometry, input, weight, rule, mask)
    return call if call is not None and not call.reads_response else None


def layer_calls(
    geometry: Geometry, input: Tensor, weight: Tensor, rule: Coefficients, mask: Mask, response_saved: bool
) -> dict[Choice, LayerCall]:
    """Every way to compute a layer's backward under "auto". The first is that of a layer that was not measured.

    Triton's interpreter, which runs its kernels on a CPU for tests, is not one of them.
    """
    planned = plan(geometry, input, weight, rule, mask, response_saved, "auto", use_measured=False)
    found: dict[Choice, LayerCall] = {}
    costs = {Algorithm.NONE: 0}
    if mask[2] and input.shape[0]:
        costs = algorithms(geometry.sizes(input.shape, weight.shape, rule.samples), rule, response_saved)
    for name in _LAYERS[_kind(geometry)]:
        if name.startswith("triton") and input.is_cpu:
            continue
        for algorithm in costs:
            choice = Choice(name, algorithm)
            call = _call(choice, geometry, input, weight, rule, mask)
            if call is not None and call not in found.values():
                found[choice] = call
    first = next(choice for choice, call in found.items() if call == planned)
    return {first: found.pop(first), **found}


def _call(
    choice: Choice, geometry: Geometry, input: Tensor, weight: Tensor, rule: Coefficients, mask: Mask
) -> LayerCall | None:
    """The call of a layer by this backend and algorithm; None if the backend is missing or does not support it."""
    name, algorithm = choice
    device_type = input.device.type
    if name not in _LAYERS[_kind(geometry)] or not _is_available(name, "depthwise_backward", device_type):
        return None
    found, chosen, missing = _candidate(name, device_type, "auto")
    if any(getattr(rule, each) for each in missing):
        return None
    if found.supports is not None and not found.supports(geometry, input, weight, rule, algorithm):
        return None
    reads_response = mask[2] and needs_response(algorithm, rule)
    if found.reads_response is not None:
        reads_response = mask[2] and found.reads_response(rule, device_type)
    return LayerCall(geometry, rule, mask, algorithm, chosen, reads_response)


def _kind(geometry: Geometry) -> str:
    return "grouped layer" if geometry is not LINEAR and geometry.groups > 1 else "layer"


@lru_cache(maxsize=4096)
def is_plain(geometry: Geometry, weight: Shape, device_type: str, backend: str) -> bool:
    """Whether the gradients of input and weight are those of PyTorch's own layer, with B in place of W."""
    candidates = _candidates(device_type, backend, geometry is not LINEAR and geometry.groups > 1)
    preferred = next(candidate for candidate in candidates if not candidate.backend.needs_terms)
    return preferred.backend is _LAYER_BACKENDS["composite"] and not geometry.skips_positions(weight)


def is_composed(call: LayerCall) -> bool:
    """Whether the backward consists of PyTorch's own kernels."""
    return call.chosen.backward is layer.backward


def stays_plain(geometry: Geometry, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether no kernel was measured to be faster than PyTorch's own backward, for a layer of :func:`is_plain`."""
    mask = (input.requires_grad, weight.requires_grad, False, bias is not None and bias.requires_grad)
    choice = choices.find(geometry, input, weight, _NO_TERMS, mask, False)
    return choice is None or choice.backend == "composite" or current_backend() != "auto"


def _algorithm(
    geometry: Geometry, input: Shape, weight: Shape, rule: Coefficients, response_saved: bool
) -> tuple[Algorithm, bool]:
    """The algorithm, and whether it reads the response."""
    algorithm = choose_algorithm(geometry.sizes(input, weight, rule.samples), rule, response_saved)
    return algorithm, needs_response(algorithm, rule)


_cached_algorithm = lru_cache(maxsize=4096)(_algorithm)


@cache
def _candidates(device_type: str, backend: str, grouped: bool) -> tuple[Candidate, ...]:
    """The implementations of a layer's backward, in order of preference."""
    kind = "grouped layer" if grouped else "layer"
    return tuple(
        _candidate(name, device_type, backend)
        for name in _preferred(kind, device_type, backend)
        if name in _LAYERS[kind] and _is_available(name, "depthwise_backward", device_type)
    )


@cache
def _candidate(name: str, device_type: str, backend: str) -> Candidate:
    """The implementation ``name`` of a layer's backward, with the functions of ``backend`` that it calls."""
    found = _LAYER_BACKENDS[name]
    center, add_centered_ = (implementation(op, device_type, backend) for op in ("center", "add_centered_"))
    missing = tuple(each for each in (*COEFFICIENTS, "normalize") if each not in found.implemented)
    return Candidate(found, Implementations(found.backward, center, add_centered_), missing)


def current_backend() -> str:
    """The backend in use: that of the innermost ``backend`` block, else that of ``set_backend``, else "auto"."""
    name = innermost.get()
    if name is not None:
        return name
    return _default if not open_blocks else _of_this_thread()


def _of_this_thread() -> str:
    """The backend of a thread without a block, while another thread has one.

    A thread that Python did not start belongs to autograd, which runs the backward of a compiled model on it on a GPU.
    Its forward pass is not known, so the block that was entered last decides.
    """
    foreign = isinstance(threading.current_thread(), threading._DummyThread)
    return next(iter(open_blocks[-1:]), _default) if foreign else _default


def set_backend(name: str) -> None:
    """Force a backend for the whole process, or return to "auto"; PYFEEDBACK_BACKEND sets the initial one.

    A ``backend`` block has precedence.

    Raises:
        ValueError: the name is not one of :data:`BACKENDS`.
        RuntimeError: "extension" without the compiled library; "triton" without triton, or without a GPU and without
            Triton's interpreter (TRITON_INTERPRET=1, set before the first use).
    """
    global _default
    _default = _available_backend(name, 3)
    implementation.cache_clear()
    _candidates.cache_clear()
    _candidate.cache_clear()
    is_plain.cache_clear()
    choices.decide_again()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block: ``with pyfeedback.backend("composite"): ...``

    It applies to the forward passes of this thread and to their backward passes, even outside of the block. Ops that
    the backend does not implement are composed of PyTorch's own.

    Raises the same errors as :func:`set_backend`.
    """
    name = _available_backend(name, 4)
    open_blocks.append(name)
    choices.decide_again()
    try:
        with use_backend(name):
            yield
    finally:
        open_blocks.remove(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use the backend of the forward pass, without the checks of :func:`backend`, in a backward pass."""
    token = innermost.set(name)
    try:
        yield
    finally:
        innermost.reset(token)


def _available_backend(name: str, stacklevel: int) -> str:
    """The current name of a backend; raises if the backend is unknown or not available."""
    if isinstance(name, str) and name in _RENAMED:
        warn_renamed(f'backend "{name}"', f'"{_RENAMED[name]}"', stacklevel)
        name = _RENAMED[name]
    check_choice("backend", name, BACKENDS)
    if name == "extension" and not loading.has_cpu():
        raise RuntimeError(f'backend is "extension", expected a compiled library: {loading.build_info().missing}')
    triton = name.startswith("triton")
    if triton and not find_spec("triton"):
        raise RuntimeError(f'backend is "{name}", expected triton to be installed')
    if triton and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f'backend is "{name}", expected a GPU, or TRITON_INTERPRET=1 for Triton\'s interpreter')
    return name


def _preferred(op: str, device_type: str, backend: str) -> tuple[str, ...]:
    return _FASTEST.get((op, device_type), ("composite",)) if backend == "auto" else (backend, "composite")


def _choose(op: str, device_type: str, backend: str) -> str:
    found = _IMPLEMENTATIONS[op]
    preferred = _preferred(op, device_type, backend)
    return next(name for name in preferred if name in found and _is_available(name, op, device_type))


def _is_available(name: str, op: str, device_type: str) -> bool:
    if name in ("extension", "depthwise", "dense"):
        op = "dense_backward" if name == "dense" else op
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
        return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"pyfeedback::extension_{op}", key)
    if name == "triton" and op == "probe_gradients":
        return find_spec("triton") is not None
    return True


set_backend(os.environ.get("PYFEEDBACK_BACKEND", "auto"))
