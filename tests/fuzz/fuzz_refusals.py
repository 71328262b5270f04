"""Random calls with one mistake each: a one-line error, and nothing is written."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

import pyfeedback
from pyfeedback import functional
from pyfeedback.backends.extension import loading

BACKENDS = ("auto", "composite", "extension") if loading.has_cpu() else ("auto", "composite")
LISTS = ("feedback", "weight", "grad", "momentum_buffer")
WRITTEN = ("feedback", "momentum_buffer")
NOT_TENSORS: tuple[Any, ...] = (None, 1.0, "weight", [1.0, 2.0], numpy.ones(3))
NOT_NUMBERS: tuple[Any, ...] = (None, "0.1", [0.1], math.nan, math.inf, -math.inf, 1j)


def check(number: int) -> None:
    """Raise AssertionError if the mistake with this number is accepted, gives no one-line error, or writes."""
    draw = random.Random(number)
    torch.manual_seed(number)
    with pyfeedback.backend(draw.choice(BACKENDS)):
        if number % 2:
            mistake = draw.choice(tuple(OF_STEPS))
            arguments = good_step(draw)
            OF_STEPS[mistake](draw, arguments)
            call: Callable = functional.feedback_step_
        else:
            call, arguments = good_layer(draw)
            mistake = draw.choice(tuple(OF_LAYERS))
            OF_LAYERS[mistake](draw, arguments)
        refused(call, arguments, mistake)


def refused(call: Callable, arguments: dict[str, Any], mistake: str) -> None:
    """Expect a one-line error, and compare every storage with its content before the call."""
    tensors = [t for v in arguments.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
    looked_at = [t for t in tensors if t.layout is torch.strided and not t.is_meta and has_storage(t)]
    before = [t.detach().clone() for t in looked_at]
    try:
        call(**arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        text = str(error)
        assert text, f"{mistake}: an error without a word"
        assert "\n" not in text, f"{mistake}: more than a line: {text!r}"
        assert "/" not in text.replace("C/groups", "").replace("K/groups", ""), f"{mistake}: a path: {text!r}"
    else:
        raise AssertionError(f"{mistake}: accepted by {call.__name__}")
    for t, value in zip(looked_at, before, strict=True):
        assert torch.equal(t, value), f"{mistake}: written all the same"


def has_storage(t: Tensor) -> bool:
    return t.untyped_storage().nbytes() >= (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))


# Steps


def good_step(draw: random.Random) -> dict[str, Any]:
    """A valid step of two or more tensors in which everything is read and written."""
    shapes = [(draw.randrange(1, 5), draw.randrange(2, 5)) for _ in range(draw.randrange(2, 5))]
    dtype = draw.choice((torch.float64, torch.float32, torch.bfloat16, torch.float16))
    lists = {name: [torch.randn(shape).to(dtype) for shape in shapes] for name in LISTS}
    numbers = {name: [0.1 * (1 + i) for i in range(len(shapes))] for name in ("decay", "self_", "tie")}
    return {**lists, **numbers, "lr": 0.1, "momentum": 0.9}


def _replace(names, make):
    """A mistake that replaces one tensor of one of these lists by make(draw, tensor)."""

    def mistake(draw: random.Random, a: dict[str, Any]) -> None:
        tensors = a[draw.choice(names)]
        i = draw.randrange(len(tensors))
        tensors[i] = make(draw, tensors[i])

    return mistake


def _freed(draw: random.Random, t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


def _too_few(draw: random.Random, a: dict[str, Any]) -> None:
    a[draw.choice(("weight", "grad", "momentum_buffer", "decay", "self_", "tie"))].pop()


def _too_many(draw: random.Random, a: dict[str, Any]) -> None:
    name = draw.choice(("weight", "grad", "momentum_buffer", "decay", "self_", "tie"))
    a[name].append(a[name][-1])


def _number(draw: random.Random, a: dict[str, Any]) -> None:
    name, value = draw.choice(("decay", "self_", "tie", "lr", "momentum")), draw.choice(NOT_NUMBERS)
    if name in ("lr", "momentum"):
        a[name] = value
    else:
        a[name][draw.randrange(len(a[name]))] = value


def _negative(draw: random.Random, a: dict[str, Any]) -> None:
    a[draw.choice(("lr", "momentum", "noise"))] = -0.5


def _twice(draw: random.Random, a: dict[str, Any]) -> None:
    """The same tensor in two written positions."""
    i = draw.randrange(1, len(a["feedback"]))
    name, other = draw.choice((("feedback",) * 2, ("momentum_buffer",) * 2, WRITTEN))
    for names in LISTS:
        a[names][i] = a[names][0].clone()
    a[name][0] = a[other][i]


def _overlapping(draw: random.Random, a: dict[str, Any]) -> None:
    """A written tensor shares part of its memory with another tensor of the same or another row."""
    written, other = draw.choice(WRITTEN), draw.choice(LISTS)
    like = a["feedback"][0]
    shared = torch.randn(like.numel() + 1).to(like.dtype)
    i = draw.randrange(len(a["feedback"])) if written != other else draw.randrange(1, len(a["feedback"]))
    for name in LISTS:
        a[name][i] = a[name][0].clone()
    a[written][0] = shared[1:].view_as(like)
    a[other][i] = shared[:-1].view_as(like)


def _dynamic(draw: random.Random, a: dict[str, Any]) -> None:
    a["dynamic"] = draw.choice((torch.ones(4).double(), torch.ones(5), torch.ones(10).double()[::2], 1.0, [1.0] * 5))


OF_STEPS: dict[str, Callable[[random.Random, dict[str, Any]], None]] = {
    "shape": _replace(LISTS, lambda draw, t: torch.zeros(t.shape[0], t.shape[1] + 1, dtype=t.dtype)),
    "dtype": _replace(
        LISTS[1:], lambda draw, t: t.to(torch.float64 if t.dtype is not torch.float64 else torch.float32)
    ),
    "integers": _replace(LISTS, lambda draw, t: t.long()),
    "complex": _replace(LISTS, lambda draw, t: t.to(torch.complex64)),
    "sparse": _replace(LISTS, lambda draw, t: t.to_sparse()),
    "meta": _replace(LISTS, lambda draw, t: t.to("meta")),
    "no tensor": _replace(LISTS, lambda draw, t: draw.choice(NOT_TENSORS)),
    "expanded": _replace(WRITTEN, lambda draw, t: t[:, :1].expand(t.shape)),
    "freed": _replace(LISTS, _freed),
    "no list": lambda draw, a: a.update({draw.choice(LISTS): draw.choice((None, 3, torch.ones(3)))}),
    "too few": _too_few,
    "too many": _too_many,
    "number": _number,
    "negative": _negative,
    "twice": _twice,
    "overlapping": _overlapping,
    "dynamic": _dynamic,
}


# Layers


def good_layer(draw: random.Random) -> tuple[Callable, dict[str, Any]]:
    """A valid call of one of the functions with small tensors."""
    dtype, groups = draw.choice((torch.float64, torch.float32, torch.bfloat16)), draw.choice((1, 2))
    rule = {"amp": 0.1, "null": 0.2, "decay": 0.3, "samples": draw.choice((0, 2))}
    kind = draw.choice(("linear", "conv2d", "convolution"))
    if kind == "linear":
        shapes, window = ((3, 4), (6, 4), (6, 4), (6,)), {}
    elif kind == "conv2d":
        shapes, window = ((3, 4, 5, 5), *[(6, 4 // groups, 3, 3)] * 2, (6,)), {"padding": 1, "groups": groups}
    else:
        shapes, window = ((3, 4, 5), *[(6, 4 // groups, 3)] * 2, (6,)), {"padding": 1, "groups": groups}
    tensors = dict(
        zip(("input", "weight", "feedback", "bias"), (torch.randn(s).to(dtype) for s in shapes), strict=True)
    )
    return getattr(functional, f"fa_{kind}"), {**tensors, **window, **rule}


def _changed(make, names=("input", "weight", "feedback", "bias")):
    def mistake(draw: random.Random, a: dict[str, Any]) -> None:
        name = draw.choice(names)
        a[name] = make(draw, a[name])

    return mistake


def _window(draw: random.Random, a: dict[str, Any]) -> None:
    if "padding" not in a:
        a["samples"] = 4  # a linear layer has no window; more samples than the batch has
        return
    name = draw.choice(("stride", "padding", "dilation", "groups"))
    values = [-1, (1, 1, 1, 1), 0.5, "all", None] + ([] if name == "padding" else [0])
    a[name] = draw.choice(values)


OF_LAYERS: dict[str, Callable[[random.Random, dict[str, Any]], None]] = {
    "no tensor": _changed(lambda draw, t: draw.choice(NOT_TENSORS), ("input", "weight", "feedback")),
    "bias": _changed(lambda draw, t: draw.choice(NOT_TENSORS[1:]), ("bias",)),
    "no dimension": _changed(lambda draw, t: t.new_zeros(())),
    "channels": _changed(lambda draw, t: torch.cat([t, t.narrow(min(1, t.dim() - 1), 0, 1)], min(1, t.dim() - 1))),
    "dtype": _changed(lambda draw, t: t.half()),
    "integers": _changed(lambda draw, t: t.int()),
    "complex": _changed(lambda draw, t: t.to(torch.complex64)),
    "sparse": _changed(lambda draw, t: t.to_sparse()),
    "device": _changed(lambda draw, t: t.to("meta")),
    "window": _window,
    "coefficient": lambda draw, a: a.update({draw.choice(("decay", "amp", "tie")): draw.choice(NOT_NUMBERS)}),
    "samples": lambda draw, a: a.update(samples=draw.choice((-1, 4, 0.5, 1.0, "2", None))),
    "center": lambda draw, a: a.update(center=draw.choice(("no", 2, None, 0.5))),
}
