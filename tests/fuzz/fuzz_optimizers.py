"""Random optimizer steps against a float64 loop: the multi-tensor step, and SGD and AdamW of a model."""

import math
import random
from itertools import pairwise
from typing import Any

import torch
from fuzz_ops import arranged
from torch import Tensor, nn

import pyfeedback
from pyfeedback import functional, optim
from pyfeedback.backends.extension import loading

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "contiguous", "channels_last", "sliced", "transposed")
BACKENDS = ("auto", "composite", "extension") if loading.has_cpu() else ("auto", "composite")
STEPS = 4
LISTS = ("feedback", "weight", "grad", "momentum_buffer")
RULES = {
    "fa": pyfeedback.rule("fa"),
    "sa": pyfeedback.rule("sa", self_=0.2, decay=0.3),
    "kp": pyfeedback.rule("kp", decay=0.05),
    "ia": pyfeedback.rule("ia"),
    "tie and self": pyfeedback.Rule(tie=0.5, self_=0.2, decay=0.1),
}


def check(number: int) -> None:
    """Raise AssertionError if the step with this number is wrong."""
    draw = random.Random(number)
    with pyfeedback.backend(draw.choice(BACKENDS)):
        if number % 3:
            check_step(draw)
        else:
            check_model(draw)


# The step of many tensors


def check_step(draw: random.Random) -> None:
    arguments = random_step(draw)
    before = {name: [t.clone() for t in arguments[name]] for name in ("feedback", "momentum_buffer")}
    expected, own, largest, skipped = step_by_loop(arguments)
    functional.feedback_step_(**arguments)
    for name in ("feedback", "momentum_buffer"):
        written = name == "feedback" or arguments["momentum"] != 0
        for i, found in enumerate(arguments[name]):
            where = f"{name}[{i}] of {describe(arguments)}"
            if skipped or not written:
                torch.testing.assert_close(found, before[name][i], rtol=0, atol=0, equal_nan=True, msg=where)
            elif found.numel():
                assert_as_accurate(found, expected[name][i], own[name][i], largest[i], where)


def random_step(draw: random.Random) -> dict[str, Any]:
    """The arguments of one step: either feedbacks alone, or each feedback followed by its weight."""
    momentum, in_pairs = draw.choice((0.0, 0.9)), draw.random() < 0.3
    torch.manual_seed(draw.randrange(2**31))
    lists: dict[str, list] = {name: [] for name in LISTS}
    numbers: dict[str, list[float]] = {name: [] for name in ("decay", "self_", "tie")}
    for _ in range(draw.randrange(1, 6)):
        shape = (5000,) if draw.random() < 0.1 else tuple(draw.randrange(6) for _ in range(draw.randrange(5)))
        dtype = draw.choice(DTYPES)
        same = draw.choice(LAYOUTS) if draw.random() < 0.5 else None
        tensors = [arranged(torch.randn(shape).to(dtype), same or draw.choice(LAYOUTS), 0) for _ in range(5)]
        values = [0.0 if draw.random() < 0.35 else draw.choice((1.0, -0.5, draw.random())) for _ in numbers]
        for name, t in zip(lists, tensors, strict=False):
            lists[name].append(t)
        for name, value in zip(numbers, values, strict=True):
            numbers[name].append(value)
        if in_pairs:  # the weight with its gradient
            weight, buffer = tensors[1], tensors[4]
            for name, t in zip(lists, (weight, weight, tensors[2], buffer), strict=True):
                lists[name].append(t)
            for name, value in zip(numbers, (draw.choice((0.0, 0.1)), 0.0, 1.0), strict=True):
                numbers[name].append(value)
    if draw.random() < 0.3:
        spoil(draw, lists)
    if momentum == 0 and draw.random() < 0.7:
        lists["momentum_buffer"] = []
    for name, coefficient in (("weight", "self_"), ("grad", "tie")):
        if not any(numbers[coefficient]) and not in_pairs:
            lists[name] = []
    options: dict[str, Any] = {"lr": draw.choice((0.1, 1.0)), "momentum": momentum}
    options |= {"nesterov": draw.random() < 0.4, "skip_nonfinite": draw.random() < 0.4}
    if draw.random() < 0.2:
        options["dynamic"] = torch.tensor([*(draw.choice((1.0, draw.random(), -1.0)) for _ in range(4)), 0.0]).double()
    return {**lists, **numbers, **options}


def spoil(draw: random.Random, lists: dict[str, list]) -> None:
    """Write an infinity or a nan into a weight or a gradient."""
    tensor = draw.choice(lists[draw.choice(("weight", "grad"))])
    if tensor.numel():
        place = tuple(draw.randrange(size) for size in tensor.shape)
        tensor[place] = draw.choice((math.inf, -math.inf, math.nan))


def step_by_loop(a: dict[str, Any]):
    """Feedbacks and buffers after the step, in float64 and in their own dtype; the largest operand of each; and whether
    the step must be skipped.
    """
    lr, momentum, dynamic = a["lr"], a["momentum"], a.get("dynamic")
    factors = [1.0] * 4 if dynamic is None else dynamic[:4].tolist()
    found: list[dict[str, list]] = []
    largest, skipped = [], False
    for wide in (True, False):
        after: dict[str, list] = {"feedback": [], "momentum_buffer": []}
        for i, b in enumerate(a["feedback"]):
            dtype = torch.float64 if wide else b.dtype
            decay, self_, tie = (a[name][i] * f for name, f in zip(("decay", "self_", "tie"), factors[1:], strict=True))
            terms = [decay * b.to(dtype)]
            for name, given, scale in (("weight", a["self_"][i], -self_), ("grad", a["tie"][i], tie)):
                if given:
                    terms.append(scale * a[name][i].to(dtype))
                    skipped = skipped or (a["skip_nonfinite"] and not a[name][i].isfinite().all().item())
            direction = sum(terms)
            if momentum:
                buffer = momentum * a["momentum_buffer"][i].to(dtype) + direction
                terms.append(momentum * a["momentum_buffer"][i].to(dtype))
                direction = direction + momentum * buffer if a["nesterov"] else buffer
                after["momentum_buffer"].append(buffer)
            after["feedback"].append(b.to(dtype) - factors[0] * lr * direction)
            if wide and b.numel():
                finite = [
                    t[t.isfinite()].abs().max().item() if t.isfinite().any() else 0.0 for t in (*terms, b.double())
                ]
                largest.append(max(finite) * max(1.0, abs(factors[0] * lr)))
            elif wide:
                largest.append(0.0)
        found.append(after)
    return found[0], found[1], largest, skipped


def assert_as_accurate(found: Tensor, exact: Tensor, own: Tensor, largest: float, where: str) -> None:
    """The error is at most twice that of plain torch in the same dtype, plus two units in the last place."""
    finite = exact.isfinite() & (exact.abs() < torch.finfo(found.dtype).max)
    assert torch.equal(found.isfinite() & finite, finite), f"not finite where float64 is: {where}"
    assert not (found.isfinite() & ~exact.isfinite()).any(), f"finite where float64 is not: {where}"
    error, plain = ((t.double() - exact)[finite].abs().nan_to_num().amax().item() if finite.any() else 0.0
                    for t in (found, own))  # fmt: skip
    ulps = 8 if found.dtype is torch.float64 else 2  # the oracle of float64 rounds too
    assert error <= 2 * plain + ulps * torch.finfo(found.dtype).eps * largest, f"off by {error:.2e}: {where}"


def describe(a: dict[str, Any]) -> str:
    sizes = [(tuple(t.shape), t.stride(), str(t.dtype)) for t in a["feedback"]]
    return f"{sizes} with { ({n: v for n, v in a.items() if n not in LISTS}) }"


# The optimizers of a whole model


def check_model(draw: random.Random) -> None:
    rule, dtype, make = draw.choice(tuple(RULES)), draw.choice(DTYPES[:2]), draw.choice((optim.SGD, optim.AdamW))
    torch.manual_seed(draw.randrange(2**31))
    sizes = [draw.randrange(1, 8) for _ in range(draw.randrange(2, 5))]
    layers = [pyfeedback.nn.Linear(c, k, bias=draw.random() < 0.5, rule=RULES[rule]) for c, k in pairwise(sizes)]
    layers += [nn.LayerNorm(sizes[-1])] if draw.random() < 0.5 else []
    model = nn.Sequential(*layers).to(dtype)
    options = {"lr": draw.choice((0.01, 0.1)), "weight_decay": draw.choice((0.0, 0.05))}
    if make is optim.SGD:
        options |= {"momentum": draw.choice((0.0, 0.9))}
        options |= {"nesterov": options["momentum"] > 0 and draw.random() < 0.5}
    else:
        options |= {"betas": draw.choice(((0.9, 0.999), (0.5, 0.9))), "amsgrad": draw.random() < 0.3, "eps": 1e-3}
    optimizer = make(model, **options)
    by_loop = [Loop(model, make, options, working) for working in (torch.float64, dtype)]
    for _ in range(STEPS):
        for p in model.parameters():
            p.grad = torch.randn_like(p) if draw.random() < 0.9 else None
        for _, layer in pyfeedback.feedback_layers(model):  # a rule that reads no data has no autograd gradient
            if not layer.rule.reads_data:
                layer.feedback.grad = None
        for loop in by_loop:
            loop.step(model)
        optimizer.step()
    exact, own = (loop.values for loop in by_loop)
    for name, p in model.named_parameters():
        error, plain = ((v.detach().double() - exact[name]).abs().max().item() for v in (p, own[name]))
        moved = max(exact[name].abs().max().item(), STEPS * options["lr"])  # rounding is relative to it
        ulps = 32 if dtype is torch.float64 else 4  # the oracle of float64 rounds too
        assert error <= 2 * plain + ulps * torch.finfo(dtype).eps * moved, (
            f"{name} is off by {error:.1e}: {rule} {options}"
        )


class Loop:
    """The same optimizer as a loop over the parameters, by the documented formulas."""

    def __init__(self, model: nn.Module, make, options: dict[str, Any], dtype: torch.dtype):
        self.adamw, self.options, self.dtype = make is optim.AdamW, options, dtype
        self.values = {name: p.detach().to(dtype, copy=True) for name, p in model.named_parameters()}
        self.states: dict[str, dict[str, Any]] = {name: {} for name in self.values}

    def step(self, model: nn.Module) -> None:
        """Update every parameter from its gradient."""
        old, grads = dict(self.values), {name: p.grad for name, p in model.named_parameters()}
        rules = {f"{name}.feedback": layer.rule for name, layer in pyfeedback.feedback_layers(model)}
        for name, value in old.items():
            gradient, weight_decay = self.direction(name, value, old, grads, rules.get(name))
            if gradient is not None:
                self.values[name] = (self.by_adamw if self.adamw else self.by_sgd)(name, value, gradient, weight_decay)

    def direction(self, name, value, old, grads, rule):
        """The gradient, or None, and the decoupled weight decay of AdamW."""
        if rule is None:
            decay = self.options["weight_decay"]
            if grads[name] is None:
                return None, 0.0
            grad = grads[name].to(self.dtype)
            return (grad, decay) if self.adamw else (grad + decay * value, 0.0)
        if rule.reads_data:
            return None if grads[name] is None else grads[name].to(self.dtype), 0.0
        weight = name.replace("feedback", "weight")
        if not rule.learns or (rule.tie and grads[weight] is None):
            return None, 0.0
        tied = rule.tie * grads[weight].to(self.dtype) if rule.tie else 0.0
        if self.adamw and rule.tie and not rule.self_:  # Kolen-Pollack uses the weight decay of W
            return tied, rule.decay
        return rule.decay * value - rule.self_ * old[weight] + tied, 0.0

    def by_sgd(self, name, value, gradient, weight_decay):
        momentum, state = self.options["momentum"], self.states[name]
        if momentum:
            state["buffer"] = momentum * state.get("buffer", 0.0) + gradient
            gradient = gradient + momentum * state["buffer"] if self.options["nesterov"] else state["buffer"]
        return value - self.options["lr"] * gradient

    def by_adamw(self, name, value, gradient, weight_decay):
        (beta1, beta2), lr, state = self.options["betas"], self.options["lr"], self.states[name]
        state["step"] = state.get("step", 0) + 1
        state["mean"] = beta1 * state.get("mean", 0.0) + (1 - beta1) * gradient
        state["square"] = beta2 * state.get("square", 0.0) + (1 - beta2) * gradient.square()
        square = state["square"]
        if self.options["amsgrad"]:
            square = state["largest"] = torch.maximum(state.get("largest", torch.zeros_like(square)), square)
        root = (square / (1 - beta2 ** state["step"])).sqrt() + self.options["eps"]
        return (1 - lr * weight_decay) * value - lr / (1 - beta1 ** state["step"]) * state["mean"] / root
