"""Measures on this machine which backward of each layer of a model is the fastest, and remembers it.

    pyfeedback.tune(model, images)                           # once for each model, batch size, dtype and machine
    python -m pyfeedback tune --network resnet50 --rule ia   # the layers of a network, without a model
    python -m pyfeedback check                               # every kernel against float64 on this device

Nothing is measured at any other time: not in a training step, while a graph is captured, or by torch.compile. What was
measured is used from then on under the backend "auto", in every process on this machine (PYFEEDBACK_TUNE=off ignores
it). It is stored in ``~/.cache/pyfeedback``, or in the folder PYFEEDBACK_CACHE.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyfeedback.backends import choices, dispatch
from pyfeedback.backends.choices import Choice, Signature
from pyfeedback.core.call import LayerCall
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.values import check_flag, check_model, check_positive
from pyfeedback.nn import FeedbackLayer

GAIN = 1.05  # over the default, at the lower quartile of the rounds: ties go to the default
ERROR = 2.0  # of the default's error against float64, beyond which a candidate is refused whatever its speed
LEAST_ROUNDS, MOST_ROUNDS = 5, 200

Timer = Callable[[Callable[[], object]], float]  # the seconds of one call


class Candidate(NamedTuple):
    """A way to compute the backward of a layer.

    Attributes:
        choice: its backend and algorithm.
        run: computes the gradients of the layer.
        error: the largest relative error of a gradient against float64; None if it raised an error.
        refused: why it does not take part; None if it does.
    """

    choice: Choice
    run: Callable[[], Any]
    error: float | None
    refused: str | None


@dataclass
class LayerReport:
    """What was measured for one layer.

    Attributes:
        signature: everything that its time depends on.
        choice: the fastest backward that is correct.
        seconds: the median time of each candidate, that of the default first.
        refused: candidates that raised an error or were wrong, with the reason.
    """

    signature: Signature
    choice: Choice
    seconds: dict[Choice, float] = field(default_factory=dict)
    refused: dict[Choice, str] = field(default_factory=dict)

    @property
    def default(self) -> Choice:
        """What is used without a measurement."""
        return next(iter(self.seconds))

    @property
    def gain(self) -> float:
        """The time of the default relative to that of the choice."""
        return self.seconds[self.default] / self.seconds[self.choice]


@dataclass
class Report:
    """The result of :func:`tune`: a report for each layer, and the file with the choices."""

    device: torch.device
    path: Path
    layers: list[LayerReport]

    def __str__(self) -> str:
        lines = [f"{'layer':58} {'ms':>9} {'choice':26} {'gain':>5}"]
        for report in self.layers:
            lines.append(
                f"{shown(report.signature):58} {1e3 * report.seconds[report.choice]:9.3f} {report.choice!s:26} "
                f"{report.gain:5.2f}"
            )
            lines += [f"  refused {choice}: {reason}" for choice, reason in report.refused.items()]
        before = sum(report.seconds[report.default] for report in self.layers)
        after = sum(report.seconds[report.choice] for report in self.layers)
        lines.append(f"all backward passes: {1e3 * before:.2f} ms before, {1e3 * after:.2f} ms now ({self.path})")
        return "\n".join(lines)


def tune(
    model: nn.Module,
    *inputs: Any,
    budget: float = 60.0,
    group: Any = None,
    progress: bool = True,
) -> Report:
    """Measure the candidates for the backward of every layer of ``model``, and use the fastest from now on.

    The candidates are PyTorch's own kernels with each algorithm for the data terms, on a CPU also with weight gradients
    as matrix products, the Triton kernels, and the compiled kernels. A candidate is refused if it raises an error, or
    if its error against float64 exceeds twice that of the default. It replaces the default only if it is 5 % faster in
    three quarters of the rounds. On a GPU, the time of a call is the longer of the device's and that of Python's
    launches.

    The model runs forward and backward once, in its current mode. Its gradients, buffers and the random state are
    restored. A layer is identified by its sizes, dtype, memory format and rule, so the result depends on the shapes of
    ``inputs``, but not on their values.

    Args:
        model: a converted model on one device.
        inputs: arguments of its forward, such as a batch of the size that training uses.
        budget: seconds for the measurements, in all.
        group: a process group of torch.distributed: each rank measures a part of the layers and all use the same
            choices. All ranks must call this together, with the same shapes.
        progress: print the progress to stderr.

    Returns:
        A report of each layer; ``print(report)`` shows a table.

    Raises:
        TypeError, ValueError: an argument is invalid, or PYFEEDBACK_TUNE is off.
        RuntimeError: no layer with a feedback weight ran.
    """
    check_model(model)
    check_positive("budget", budget)
    check_flag("progress", progress)
    device = _device_of(model)
    signatures = list(signatures_of(model, *inputs))
    if not signatures:
        raise RuntimeError("no layer with a feedback weight ran, expected a model converted by pyfeedback.convert")
    return measure(signatures, device, budget, group, progress)


def signatures_of(model: nn.Module, *inputs: Any) -> dict[Signature, None]:
    """The signatures of all layers in one forward and backward pass of a model, whose state is restored."""
    device = _device_of(model)
    backend = dispatch.current_backend()
    if backend != "auto":
        raise ValueError(f"the backend is {backend}, expected auto, which uses what is measured")
    with _restored(model), choices.recorded(device) as signatures, torch.enable_grad():
        output = model(*inputs)
        losses = [t.float().sum() for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if losses:
            torch.autograd.backward(losses)
    return signatures


@contextmanager
def _restored(model: nn.Module):
    """Restore gradients, buffers and random numbers after the block, and what the layers know of their last call."""
    layers = [module for module in model.modules() if isinstance(module, FeedbackLayer)]
    called = [layer.called for layer in layers]
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        for p, _ in gradients:
            p.grad = None
        with torch.random.fork_rng():
            yield
    finally:
        for p, grad in gradients:
            p.grad = grad
        with torch.no_grad():
            for b, before in buffers:
                b.copy_(before)
        for layer, was_called in zip(layers, called, strict=True):
            layer.called = was_called


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def measure(
    signatures: Sequence[Signature], device: torch.device, budget: float, group: Any = None, progress: bool = False
) -> Report:
    """Race the candidates of each layer, agree with the other ranks, and store the choices."""
    if choices.mode() == "off":
        raise ValueError(f"{choices.VARIABLE} is off, expected cached: what is measured would not be used")
    rank, ranks = (torch.distributed.get_rank(group), torch.distributed.get_world_size(group)) if group else (0, 1)
    if group:
        gathered: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(gathered, list(signatures), group=group)
        signatures = list(dict.fromkeys(s for part in gathered for s in part))
    mine = list(signatures)[rank::ranks]
    end, reports = time.monotonic() + budget, {}
    for i, signature in enumerate(mine):
        if progress:
            print(f"\r{i + 1} of {len(mine)} layers: {shown(signature):60}", end="", file=sys.stderr, flush=True)
        share = (end - time.monotonic()) / (len(mine) - i)
        reports[signature] = race(signature, device, share)
    if progress:
        print(file=sys.stderr)
    if group:
        torch.distributed.all_gather_object(gathered, reports, group=group)
        reports = {signature: report for part in gathered for signature, report in part.items()}
    layers = [reports[signature] for signature in signatures]
    path = choices.write(device, {str(report.signature): report.choice for report in layers})
    return Report(device, path, layers)


def race(signature: Signature, device: torch.device, seconds: float, timer: Timer | None = None) -> LayerReport:
    """Time the candidates of a layer in turn, in rounds, after those that are wrong are refused."""
    everyone = candidates(signature, device)
    correct = {each.choice: each.run for each in everyone if each.refused is None}
    refused = {each.choice: each.refused for each in everyone if each.refused is not None}
    timer = timer or timer_of(device)
    times: dict[Choice, list[float]] = {choice: [] for choice in correct}
    end = time.monotonic() + seconds
    for done in range(1, MOST_ROUNDS + 1):
        for choice, run in correct.items():
            times[choice].append(timer(run))
        if done >= LEAST_ROUNDS and (len(correct) == 1 or time.monotonic() > end):
            break
    medians = {choice: statistics.median(each) for choice, each in times.items()}
    return LayerReport(signature, winner(times, everyone[0].choice), medians, refused)


def winner(times: dict[Choice, list[float]], default: Choice) -> Choice:
    """The candidate with the least median among those that are faster than the default beyond doubt."""
    best = default
    for choice, each in times.items():
        gains = sorted(before / now for before, now in zip(times[default], each, strict=True))
        certain = gains[len(gains) // 4] >= GAIN
        if certain and statistics.median(each) < statistics.median(times[best]):
            best = choice
    return best


def candidates(signature: Signature, device: torch.device) -> list[Candidate]:
    """The candidates of a layer, that of the default first, on random operands.

    Raises an error only if the default does.
    """
    tensors, rule = operands(signature, device)
    _, input, weight, _, _ = tensors
    mask = (*signature.needed, False)
    calls = dispatch.layer_calls(signature.geometry, input, weight, rule, mask, signature.response_saved)
    exact = exact_gradients(signature, tensors, rule)
    found: list[Candidate] = []
    for choice, call in calls.items():
        run, error, refused = _run_of(call, tensors), None, None
        try:
            error = largest_error(run(), exact)
        except Exception as raised:  # a kernel may fail to compile or to launch in any way
            if not found:
                raise
            refused = f"{type(raised).__name__}: {str(raised).partition(chr(10))[0]}"
        else:
            allowed = ERROR * ((found[0].error if found else error) or 0.0) + torch.finfo(signature.dtype).eps
            if not error <= allowed:
                refused = f"error {error:.1e}, expected at most {allowed:.1e}"
        found.append(Candidate(choice, run, error, refused))
    return found


def operands(signature: Signature, device: torch.device) -> tuple[list[Any], Coefficients]:
    """Random tensors of a layer: the gradient of its output, input, weight, feedback and response; and a rule."""
    generator = torch.Generator().manual_seed(0)
    geometry = signature.geometry

    def draw(shape: Sequence[int], layout: str, scale: float = 1.0) -> Tensor:
        t = (scale * torch.randn(*shape, generator=generator)).to(device, signature.dtype)
        return t.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else t

    fan_in = max(1, torch.Size(signature.weight[1:]).numel())
    input = draw(signature.input, signature.layouts[0])
    weight, feedback = (draw(signature.weight, signature.layouts[1], fan_in**-0.5) for _ in range(2))
    grad_output = draw(geometry.output_shape(signature.input, signature.weight), signature.layouts[0])
    response = geometry.fprop(input, weight) if signature.response_saved else None
    values = dict.fromkeys(signature.terms, 0.5)
    options = {name: True for name in ("center", "normalize") if values.pop(name, None)}
    rule = Coefficients(**values, **options, samples=signature.samples)  # type: ignore[arg-type]
    return [grad_output, input, weight, feedback, response], rule


def _run_of(call: LayerCall, tensors: Sequence[Tensor | None]) -> Callable[[], Any]:
    *operands, response = tensors

    @torch.no_grad()
    def run():
        return call.chosen.backward(call, *operands, response if call.reads_response else None)

    return run


def exact_gradients(signature: Signature, tensors: Sequence[Any], rule: Coefficients) -> Sequence[Tensor | None]:
    """The gradients in float64, composed of PyTorch's own kernels."""
    exact: list[Any] = [None if t is None else t.double() for t in tensors]
    _, input, weight, _, response = exact
    if response is not None:
        exact[4] = signature.geometry.fprop(input, weight)
    mask = (*signature.needed, False)
    call = dispatch.plan(signature.geometry, input, weight, rule, mask, response is not None, "composite")
    return _run_of(call, exact)()


def largest_error(found: Iterable[Tensor | None], exact: Iterable[Tensor | None]) -> float:
    """The largest relative error of the gradients, in the norm of each; infinite if one is not finite."""
    errors = [0.0]
    for ours, true in zip(found, exact, strict=True):
        if true is not None:
            assert ours is not None
            norm = true.norm().item()
            errors.append((ours.double() - true).norm().item() / (norm or 1.0))
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def timer_of(device: torch.device) -> Timer:
    """The timer of a device: on a GPU, the longer of its own time and that until all is launched."""
    if device.type != "cuda":
        return _host_seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(run: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        start.record()
        host = _host_seconds(run)
        end.record()
        end.synchronize()
        return max(host, start.elapsed_time(end) / 1e3)

    return seconds


def _host_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def shown(signature: Signature) -> str:
    """A layer in one line."""
    kernel = "x".join(map(str, signature.weight))
    dtype = str(signature.dtype).removeprefix("torch.")
    return f"{'x'.join(map(str, signature.input))} by {kernel}, {dtype}, {'+'.join(signature.terms) or 'no terms'}"
