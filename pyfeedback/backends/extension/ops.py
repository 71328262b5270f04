"""The compiled ops `extension_*` with the signatures of the composite ones.

A kernel checks its tensors before it writes, in a fraction of the time that Python needs. If the check fails, it is
repeated in Python for an error of one line that names the argument.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyfeedback.backends.composite import center as composite_center
from pyfeedback.backends.composite import probes as composite_probes
from pyfeedback.backends.composite import steps as composite_steps
from pyfeedback.core import step_checks
from pyfeedback.core.probes import ProbeProblem
from pyfeedback.core.step_options import StepOptions
from pyfeedback.core.tensors import acc_dtype

LEAST_BASIS = 8  # probes of the smallest basis that the kernel of probe_gradients transforms

_ops = torch.ops.pyfeedback

alignment_products = _ops.extension_alignment_products.default


def center(input: Tensor, samples: int) -> Tensor:
    """The kernel requires samples that are dense in memory; the composite op is used for other inputs."""
    if input.is_contiguous() or _has_dense_samples(input):
        return _ops.extension_center.default(input, samples)
    return composite_center.center(input, samples)


def _has_dense_samples(t: Tensor) -> bool:
    """Whether each sample is dense and none overlap; there may be gaps between them."""
    first = t[:1]
    dense = first.is_contiguous() or (t.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last))
    return dense and (t.shape[0] <= 1 or t.stride(0) >= first.numel())


def add_centered_(self: Tensor, input: Tensor, beta: float, alpha: float) -> None:
    """The kernel requires dense samples with the same strides in both; the composite op is used for other inputs."""
    alike = self.stride() == input.stride()
    if alike and (self.is_contiguous() or (self.dim() == 4 and self.is_contiguous(memory_format=torch.channels_last))):
        _ops.extension_add_centered_.default(self, input, beta, alpha)
    else:
        composite_center.add_centered_(self, input, beta, alpha)


def feedback_step_(feedback, weight, grad, momentum_buffer, coefficients: dict, options: StepOptions) -> None:
    """See :func:`pyfeedback.functional.feedback_step_`."""
    prepare_feedback_step(coefficients, options)(feedback, weight, grad, momentum_buffer, options.lr)


def prepare_feedback_step(coefficients: dict, options: StepOptions) -> Callable[..., None]:
    """:func:`feedback_step_` with these numbers, as a function of the tensors and the learning rate."""
    # To pass a tensor costs as much as to update a small one, and to pass a number a quarter of that.
    decay, self_, tie = (_compact(values) for values in coefficients.values())
    reads_weight, reads_grad, has_momentum = any(self_), any(tie), bool(options.momentum)
    others = options._asdict()
    del others["lr"]
    op = _ops.extension_feedback_step_.default

    def step(feedback, weight, grad, momentum_buffer, lr: float) -> None:
        count, buffers = len(feedback), momentum_buffer if has_momentum else []
        try:
            if not {len(weight), len(grad), len(momentum_buffer)} <= {0, count}:
                raise RuntimeError("lists differ in length")
            read = weight if reads_weight else [], grad if reads_grad else []
            op(feedback, *read, buffers, decay=decay, self_=self_, tie=tie, lr=lr, **others)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            step_checks.check_step_tensors(
                feedback, weight, grad, momentum_buffer, coefficients, options._replace(lr=lr)
            )
            raise step_checks.kernel_error(error) from None
        torch.autograd.graph.increment_version([*feedback, *buffers])  # PyTorch does not track these writes

    return step


setattr(feedback_step_, "prepare", prepare_feedback_step)  # noqa: B010  # for those that call it again and again


def adamw_step_(param, weight, grad, exp_avg, exp_avg_sq, max_exp_avg_sq=(), *, step, **options) -> None:
    """See :func:`pyfeedback.backends.composite.steps.adamw_step_`, which also implements amsgrad and other devices."""
    if max_exp_avg_sq or param[0].device.type != "cpu":
        composite_steps.adamw_step_(param, weight, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step=step, **options)
        return
    weights = weight if any(options["self_"]) else []
    grads = grad if any(options["tie"]) else []
    try:
        _ops.extension_adamw_step_.default(param, weights, grads, exp_avg, exp_avg_sq, step, **options)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        step_checks.check_adamw_tensors(param, weight, grad, moments, step, options)
        raise step_checks.kernel_error(error) from None
    torch.autograd.graph.increment_version([*param, *exp_avg, *exp_avg_sq, *step])


def probe_gradients(problems: Sequence[ProbeProblem], seed: int, step: int) -> list[Tensor]:
    """The kernel multiplies by orthogonal probes in a fast transform of their basis; other problems are composed."""
    found = []
    for problem in problems:
        compute = _transformed_gradient if _has_transform(problem) else composite_probes.composed_gradient
        found.append(compute(problem, composite_probes.generator_of(problem, seed, step)))
    return found


def _has_transform(problem: ProbeProblem) -> bool:
    """Whether the kernel computes this problem; with sparse and null, it would have to transform W as well."""
    part, rule = problem.part, problem.rule
    if part is None or part.is_whole or len(part.paley) << part.power < LEAST_BASIS:
        return False
    return problem.weight.device.type == "cpu" and not (rule.sparse and rule.null)


def _transformed_gradient(problem: ProbeProblem, generator: torch.Generator) -> Tensor:
    """As :func:`pyfeedback.backends.composite.probes.composed_gradient`, for a part of a basis."""
    weight, feedback, _, rule, _, part = problem
    assert part is not None
    wide, inputs = acc_dtype(weight.dtype), weight.shape[-1]
    w, b = (t.to(wide).contiguous() for t in (weight, feedback))
    signs, rows = composite_probes.draw_basis(inputs, part.start, part.stop, weight, generator)
    paley = composite_probes.paley_matrix(len(part.paley), wide, weight.device)
    scale = part.scale**2 / len(rows)
    of_weight = (rule.sparse, rule.amp, scale) if rule.sparse else (0.0, -1.0, -rule.amp * scale)
    gradient, response = _ops.extension_probe_gradients.default(
        w.view(-1, inputs), b.view(-1, inputs), signs, rows, paley, [rule.decay, rule.self_, *of_weight], rule.null != 0
    )
    gradient = gradient.view(b.shape)
    if rule.null:
        composite_probes.add_null_(gradient, response.view(*b.shape[:2], len(rows)).mT, b, rule, scale)
    return gradient


def _compact(values):
    """A list of one number if all are equal."""
    return values[:1] if values.count(values[0]) == len(values) else values
