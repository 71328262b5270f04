"""The overhead of a layer per call: forward and backward pass of a tiny layer on one thread, with an optimizer's step
under sa and kp, whose feedback weights have no gradient of autograd."""

import copy

import pytest
import torch
from implementations import SUBJECT
from selection import RULES
from timing import HostTimer, Step
from torch import nn

import pyfeedback

LAYERS = {  # the shape of an input, and a function that makes the layer
    "8-8-3x3 on (2, 8, 8, 8)": ((2, 8, 8, 8), lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False)),
    "4-4-3x3 on (1, 4, 5, 5)": ((1, 4, 5, 5), lambda: nn.Conv2d(4, 4, 3, bias=False)),
    "64-64 on (8, 64)": ((8, 64), lambda: nn.Linear(64, 64)),
}
UPDATED = ("sa", "kp")
UPDATE = {"lr": 1e-3, "momentum": 0.9}
CALLS = 100  # per measurement


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("tiny", list(LAYERS))
def test_call(race, selection, tiny, rule_name):
    size, make = LAYERS[tiny]
    torch.manual_seed(0)
    input, plain = torch.randn(size, requires_grad=True), make()
    ours = pyfeedback.convert(copy.deepcopy(plain), RULES[rule_name])
    torch.testing.assert_close(ours(input), plain(input), rtol=0, atol=0)
    optimizers = {}
    if rule_name in UPDATED:
        optimizers = {
            SUBJECT: pyfeedback.optim.SGD(ours, **UPDATE),
            "plain": torch.optim.SGD(plain.parameters(), fused=True, **UPDATE),
        }
    calls = {name: call(layer, input, optimizers.get(name)) for name, layer in ((SUBJECT, ours), ("plain", plain))}
    race(
        "overhead",
        calls,
        timer=HostTimer(CALLS if selection.timed else 1),
        group=f"overhead {tiny}",
        layer=tiny,
        rule=rule_name,
        dtype="float32",
        optimizer=rule_name in UPDATED,
        calls=CALLS,
    )


def call(layer, input, optimizer):
    grad_output = torch.ones_like(layer(input))
    leaves = [input, *layer.parameters()]

    def run():
        for leaf in leaves:
            leaf.grad = None
        layer(input).backward(grad_output)
        if optimizer is not None:
            optimizer.step()

    return Step(run)
