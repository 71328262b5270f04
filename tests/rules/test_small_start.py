"""A small start: weights that a normalization follows become small, and the function of the model stays the same."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import pyfeedback


class Block(nn.Module):
    """A residual block; the output of ``plain`` is read twice, and that of ``last`` by no normalization."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.groups = nn.GroupNorm(2, 8)
        self.plain = nn.Conv2d(8, 8, 1)
        self.other = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 6)
        self.layers = nn.LayerNorm(6)
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        y = F.relu(self.norm(self.first(x)))
        y = self.groups(self.second(y))
        z = self.plain(y)
        return self.last(self.layers(self.linear((self.other(z) + z).mean((2, 3)))))


NORMALIZED = ["first", "second", "linear"]


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return Block().to(dtype)


def images(count=5):
    return torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_the_function_stays_the_same(factor, training):
    plain = model()
    for norm in (plain.norm, plain.groups, plain.layers):
        norm.eps = 1e-14
    plain(images())  # changes the running statistics
    small = copy.deepcopy(plain)
    assert pyfeedback.start_small(small, factor) == NORMALIZED
    for name, p in small.named_parameters():
        scaled = name.partition(".")[0] in NORMALIZED
        torch.testing.assert_close(p, plain.get_parameter(name) * (factor if scaled else 1.0))
    expected, found = (each.train(training)(images()) for each in (plain, small))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("converted_first", [True, False])
def test_feedback_weights_are_small_as_well(converted_first):
    network = model()
    if converted_first:
        pyfeedback.convert(network, "kp")
    names = pyfeedback.start_small(network)
    if not converted_first:
        pyfeedback.convert(network, "kp")
    assert names == NORMALIZED
    for measured in pyfeedback.alignment(network).values():
        assert 0.6 < measured.norm_ratio < 1.6


def test_the_angle_of_kp_shrinks_sooner():
    angles = []
    for small in (False, True):
        network = model()
        if small:
            pyfeedback.start_small(network)
        pyfeedback.convert(network, pyfeedback.rule("kp", tau=200))
        optimizer = pyfeedback.optim.SGD(network, lr=0.02)
        for step in range(60):
            optimizer.param_groups[0]["lr"] = 0.02 * min(1, step / 20)
            optimizer.zero_grad()
            F.cross_entropy(network(images(32)), torch.arange(32) % 4).backward()
            optimizer.step()
        angles.append(pyfeedback.alignment(network)["second"].angle)
    assert angles[1] < 0.6 * angles[0]


def test_layers_with_a_weight_that_others_use_stay_as_they_are():
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    network[2].weight = network[0].weight
    assert pyfeedback.start_small(network) == ["3"]
    network[2].weight = nn.Parameter(network[0].weight.detach().clone())
    network[3].weight = network[0].weight  # both are followed by a normalization: scaled once
    before = network[0].weight.detach().clone()
    assert pyfeedback.start_small(network) == ["0", "3"]
    torch.testing.assert_close(network[0].weight.detach(), 0.1 * before)


def test_a_computed_weight_stays_as_it_is():
    network = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.LayerNorm(4))
    assert pyfeedback.start_small(network) == []


def test_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.end = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.end(self.norm(self.layer(self.norm(self.layer(x)))))

    assert pyfeedback.start_small(Twice()) == ["layer"]


def test_bad_input():
    class Decides(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    for factor in (0.0, -1.0, float("nan"), "small"):
        with pytest.raises((ValueError, TypeError), match="factor is"):
            pyfeedback.start_small(model(), factor)
    with pytest.raises(ValueError, match=r"model is a Decides that torch\.fx cannot trace"):
        pyfeedback.start_small(Decides())
    with pytest.raises(TypeError, match="model is"):
        pyfeedback.start_small("resnet")
