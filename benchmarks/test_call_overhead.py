"""The overhead of a layer per call: forward and backward pass of a tiny convolution on one thread."""

import pytest
import torch
from implementations import SUBJECT
from selection import RULES
from timing import HostTimer, Step
from torch import nn

import pyfeedback

LAYERS = {  # input, and the convolution's channels, window and padding
    "8-8-3x3 on (2, 8, 8, 8)": ((2, 8, 8, 8), (8, 8, 3, 1, 1)),
    "4-4-3x3 on (1, 4, 5, 5)": ((1, 4, 5, 5), (4, 4, 3, 1, 0)),
}
CALLS = 100  # per measurement


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("tiny", list(LAYERS))
def test_call(race, selection, tiny, rule_name):
    size, arguments = LAYERS[tiny]
    torch.manual_seed(0)
    input = torch.randn(size, requires_grad=True)
    plain = nn.Conv2d(*arguments, bias=False)
    ours = pyfeedback.nn.Conv2d(*arguments, bias=False, rule=RULES[rule_name])
    ours.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(ours(input), plain(input), rtol=0, atol=0)
    race(
        "overhead",
        {SUBJECT: call(ours, input), "plain": call(plain, input)},
        timer=HostTimer(CALLS if selection.timed else 1),
        group=f"overhead {tiny}",
        layer=tiny,
        rule=rule_name,
        dtype="float32",
        calls=CALLS,
    )


def call(layer, input):
    grad_output = torch.ones_like(layer(input))
    leaves = [input, *layer.parameters()]

    def run():
        for leaf in leaves:
            leaf.grad = None
        layer(input).backward(grad_output)

    return Step(run)
