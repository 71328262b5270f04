"""Operands of the steps, for the tests of rejected calls and of what they must leave unchanged."""

import re

import pytest
import torch

from pyfeedback import functional
from pyfeedback.backends.dispatch import current_implementation
from pyfeedback.backends.extension import loading

PATHS = [
    pytest.param("extension", marks=pytest.mark.skipif(not loading.has_cpu(), reason="the CPU library is not built")),
    "composite",
]
ALL = {"decay": 0.1, "self_": 0.2, "tie": 0.3}
ADAMW = {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3}


def lists(count, size=(4, 6), seed=0):
    """Feedback, weight, grad and momentum buffers that share no memory."""
    generator = torch.Generator().manual_seed(seed)
    names = ("feedback", "weight", "grad", "momentum_buffer")
    return {name: [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(count)] for name in names}


def step(operands, momentum=0.9, **coefficients):
    count = len(operands["feedback"])
    numbers = {name: coefficients.get(name, [value] * count) for name, value in ALL.items()}
    functional.feedback_step_(**operands, **numbers, lr=0.5, momentum=momentum)


def adamw_lists(count):
    operands = lists(count)
    operands = {"param": operands["feedback"], "weight": operands["weight"], "grad": operands["grad"]}
    operands["exp_avg"], operands["exp_avg_sq"] = (
        [t.abs() for t in ts] for ts in list(lists(count, seed=1).values())[:2]
    )
    operands["step"] = [torch.tensor(1.0) for _ in range(count)]
    return operands


def adamw_step(operands):
    count, step = len(operands["param"]), operands["step"]
    numbers = {name: [value] * count for name, value in {**ALL, "weight_decay": 0.01}.items()}
    tensors = [operands[name] for name in ("param", "weight", "grad", "exp_avg", "exp_avg_sq")]
    current_implementation("adamw_step_", "cpu")(*tensors, step=step, **numbers, **ADAMW)


def refuses(call, operands, message):
    """The call raises a one-line error and writes nothing."""
    tensors = [t for ts in operands.values() for t in ts]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if not t.is_meta}
    before = {data: bytes(storage) for data, storage in storages.items()}
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        call(operands)
    assert "\n" not in str(refused.value)
    assert all(bytes(storages[data]) == held for data, held in before.items())
