"""The training step of one layer by each implementation, and the check of its gradients against float64."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import composed
import torch
from timing import Step
from torch import Tensor
from torch.nn import functional as F

import pyfeedback
from pyfeedback import Rule, reference
from pyfeedback.testing import ConvInputs, ConvShape, conv_inputs

SUBJECT = "pyfeedback"
FORCED = ("triton", "triton-unfused", "extension")  # pyfeedback with these kernels forced
BASELINES = ("plain", "reference", "composed", "compiled", *FORCED)

CHECKED_BATCH = 4
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # float32: TF32


class LayerStep:
    """Forward and backward pass of one layer; ``outputs`` computes the outputs from ``leaves``."""

    def __init__(
        self, outputs: Callable[[], list[Tensor]], leaves: dict[str, Tensor], grad_output: Tensor, backend: str = "auto"
    ):
        self._outputs, self._grad_output, self._backend = outputs, grad_output, backend
        self.leaves = leaves
        self._ready: list[Tensor] = []

    def step(self, backward_only: bool = False) -> Step:
        """The timed function. Gradients are None when it starts."""
        if backward_only:
            return Step(self._backward, self._forward)
        return Step(self._both, self._clear)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of one step, by leaf."""
        self._clear()
        self._both()
        return {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}

    def _clear(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def _forward(self) -> None:
        self._clear()
        self._ready = self._outputs()

    def _backward(self) -> None:
        if self._backend == "auto":  # no context manager in the timed step
            torch.autograd.backward(self._ready, [self._grad_output, *[None] * (len(self._ready) - 1)])
            return
        with pyfeedback.backend(self._backend):
            torch.autograd.backward(self._ready, [self._grad_output])

    def _both(self) -> None:
        self._ready = self._outputs()
        self._backward()
        self._ready = []


def layer_step(name: str, shape: ConvShape, rule: Rule, inputs: ConvInputs) -> LayerStep:
    """The step of one implementation. The tensors may be shared with other implementations."""
    x, w, b, grad_output = inputs
    b = b.detach().requires_grad_(rule.learns)
    leaves = {"input": x, "weight": w, "feedback": b}
    coefficients, window = rule.coefficients(x.shape[0], 1), shape.window
    if name in (SUBJECT, *FORCED):
        layer = pyfeedback.nn.Conv2d(
            shape.in_channels, shape.out_channels, shape.kernel, *window, bias=False, device=x.device, dtype=x.dtype,
            rule=rule,
        )  # fmt: skip
        leaves["weight"] = layer.weight = torch.nn.Parameter(w.detach())
        if rule.transport:
            del leaves["feedback"]
        else:
            leaves["feedback"] = layer.feedback = torch.nn.Parameter(b.detach(), rule.learns)
        return LayerStep(lambda: [layer(x)], leaves, grad_output, name if name in FORCED else "auto")
    if name == "plain":
        return LayerStep(lambda: [F.conv2d(x, w, None, *window)], {"input": x, "weight": w}, grad_output)
    if name == "composed":
        return LayerStep(lambda: [composed.conv2d(x, w, b, window, coefficients)], leaves, grad_output)

    def forward(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return reference.conv2d(x, w, b, None, *window, **coefficients._asdict())

    if name == "compiled":
        torch._dynamo.reset()
        forward = torch.compile(forward, dynamic=False)

    def outputs() -> list[Tensor]:
        y, penalty = forward(x, w, b)
        return [y, penalty] if penalty.requires_grad else [y]

    return LayerStep(outputs, leaves, grad_output)


@contextmanager
def _no_autotuning() -> Iterator[None]:
    """Disable cuDNN's autotuning for a step that runs once."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@_no_autotuning()
def check(names: list[str], shape: ConvShape, rule: Rule, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Raise if a gradient differs from the float64 reference; return the largest error of each implementation.

    The batch is small; a rule with ``samples`` uses half of it. Errors are relative, in the 2-norm.
    """
    if isinstance(rule.samples, float):
        rule = pyfeedback.rule(rule, samples=0.5)
    inputs = conv_inputs(shape, CHECKED_BATCH, dtype, device)
    wide = ConvInputs(*(t.detach().double().requires_grad_(t.requires_grad) for t in inputs))
    backprop = pyfeedback.rule("bp")
    expected = {"plain": layer_step("plain", shape, backprop, wide).gradients()}
    if not rule.transport:
        expected["rule"] = layer_step("reference", shape, rule, wide).gradients()
    errors = {}
    for name in names:
        oracle = expected["plain" if name == "plain" or rule.transport else "rule"]
        errors[name] = largest_error(layer_step(name, shape, rule, inputs).gradients(), oracle)
        if not errors[name] <= TOLERANCE[dtype]:
            raise AssertionError(f"{name} of {shape.name} under {rule}: relative error {errors[name]:.1e}")
    return errors


def largest_error(gradients: dict[str, Tensor], oracle: dict[str, Tensor]) -> float:
    """The largest relative error over all gradients, in the 2-norm."""
    if gradients.keys() != oracle.keys():
        raise AssertionError(f"gradients of {sorted(gradients)}, expected those of {sorted(oracle)}")
    errors = []
    for name, expected in oracle.items():
        expected = expected.double()
        norm = expected.norm().clamp_min(torch.finfo(torch.float64).tiny)
        errors.append(((gradients[name].double() - expected).norm() / norm).item())
    return max(errors)


def first_run(step: LayerStep) -> str:
    """The reason why a torch.compile step cannot run here, or ""."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            step.gradients()
        except Exception as error:  # compilers raise many types
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""
