"""Hundreds of invalid steps: one-line errors, nothing written, and the same errors on both paths."""

import random

import numpy as np
import pytest
import torch

import pyfeedback
from pyfeedback import functional
from pyfeedback.backends.extension import loading

BACKENDS = ["extension", "composite"] if loading.has_cpu() else ["composite"]
SHAPES = [(4, 6), (3,), (2, 3, 5)]
LISTS = ("feedback", "weight", "grad", "momentum_buffer")


def good():
    generator = torch.Generator().manual_seed(0)
    call = {name: [torch.randn(s, generator=generator) for s in SHAPES] for name in LISTS}
    call |= {name: [0.1] * len(SHAPES) for name in ("decay", "self_", "tie")}
    return call | {"lr": 0.1, "momentum": 0.9, "nesterov": False, "noise": 0.0, "seed": 0, "skip_nonfinite": False}


def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


# Replacements for one tensor of a list.
TENSORS = {
    "none": lambda t: None,
    "number": lambda t: 0.5,
    "array": lambda t: t.numpy().copy(),
    "list": lambda t: t.tolist(),
    "shape": lambda t: torch.ones(7),
    "scalar": lambda t: torch.tensor(1.0),
    "transposed shape": lambda t: t[None],
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "integer": lambda t: t.int(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "freed": freed,
}
WRITTEN = {
    "expanded": lambda t: torch.zeros(()).expand(t.shape),
    "windows": lambda t: torch.zeros(99).as_strided(t.shape, (1,) * t.dim()),
}
WHOLE = {
    "none": lambda ts: None,
    "tensor": lambda ts: ts[0],
    "too few": lambda ts: ts[:2],
    "too many": lambda ts: [*ts, ts[0].clone()],
    "generator": lambda ts: iter(ts),
    "string": lambda ts: "abc",
}
NUMBERS = [None, "0.1", float("nan"), float("inf"), 1j, [0.1], torch.ones(2), np.ones(2), 10**400]
SEEDS = [None, 0.5, "1", 2**63, -(2**63) - 1]


def cases():
    for name in LISTS:
        tensors = {**TENSORS, **(WRITTEN if name in ("feedback", "momentum_buffer") else {})}
        for what, change in tensors.items():
            for i in range(len(SHAPES)):
                if what == "windows" and len(SHAPES[i]) == 1:
                    continue  # a valid tensor
                if not (what == "scalar" and SHAPES[i] == ()) and not (what == "expanded" and SHAPES[i] == ()):
                    yield f"{name}[{i}] {what}", (name, i, change)
        for what, change in WHOLE.items():
            yield f"{name} {what}", (name, None, change)
    for name in ("decay", "self_", "tie"):
        for k, value in enumerate(NUMBERS):
            yield f"{name}[1] number {k}", (name, 1, lambda _, value=value: value)
        for what in ("none", "too few", "string"):
            yield f"{name} {what}", (name, None, WHOLE[what])
    for name in ("lr", "momentum", "noise"):
        for k, value in enumerate([*NUMBERS, -0.1]):
            yield f"{name} number {k}", (name, None, lambda _, value=value: value)
    for name in ("nesterov", "skip_nonfinite"):
        for value in (None, "yes", 2):
            yield f"{name} {value}", (name, None, lambda _, value=value: value)
    for value in SEEDS:
        yield f"seed {value}", ("seed", None, lambda _, value=value: value)
    for k, value in enumerate([1.0, torch.ones(4).double(), torch.ones(5), torch.ones(10).double()[::2]]):
        yield f"dynamic {k}", ("dynamic", None, lambda _, value=value: value)


CASES = dict(cases())


def test_there_are_many_bad_calls():
    assert len(CASES) > 192


@pytest.mark.parametrize("case", CASES)
def test_both_paths_refuse_a_bad_call_and_write_nothing(case):
    name, i, change = CASES[case]
    said = []
    for backend in BACKENDS:
        call = good()
        kept = {key: [t.clone() for t in call[key]] for key in ("feedback", "momentum_buffer")}
        originals = {key: list(call[key]) for key in kept}
        if i is None:
            call[name] = change(call.get(name))
        else:
            call[name][i] = change(call[name][i])
        with pyfeedback.backend(backend), pytest.raises((ValueError, TypeError)) as refused:
            functional.feedback_step_(**call)
        said.append(str(refused.value))
        for key, before in kept.items():
            assert all(torch.equal(t, b) for t, b in zip(originals[key], before, strict=True))
    assert len(set(said)) == 1
    assert "\n" not in said[0]
    assert name in said[0]


@pytest.mark.parametrize("seed", range(100))
def test_two_mistakes_at_once(seed):
    draw = random.Random(seed)
    # The dispatcher prints a list that has a non-tensor, and printing a freed tensor crashes the process.
    chosen = [CASES[draw.choice([case for case in CASES if "freed" not in case])] for _ in range(2)]
    for backend in BACKENDS:
        call = good()
        kept = {key: [t.clone() for t in call[key]] for key in ("feedback", "momentum_buffer")}
        originals = {key: list(call[key]) for key in kept}
        for name, i, change in chosen:
            try:
                if i is None:
                    call[name] = change(call.get(name))
                else:
                    call[name][i] = change(call[name][i])
            except (TypeError, AttributeError, IndexError, RuntimeError):
                pass  # the first mistake removed the operand of the second
        with pyfeedback.backend(backend), pytest.raises((ValueError, TypeError)) as refused:
            functional.feedback_step_(**call)
        assert "\n" not in str(refused.value)
        for key, before in kept.items():
            assert all(torch.equal(t, b) for t, b in zip(originals[key], before, strict=True))
