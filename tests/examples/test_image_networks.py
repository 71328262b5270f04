"""The residual and plain networks of the examples: depth, shapes, initialization, and training under every rule."""

import importlib
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyfeedback

for needed in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.usefixtures("example_folder")

RULES = ("bp", "fa", "wm", "ia", "sa", "aa", "kp", "oja", "usf", "frsf", "brsf", "pfa", "dfa")


def example(name):
    """Import a module of the examples folder, which is not a package."""
    return importlib.import_module(name)


def layers(network):
    """The layers that count towards the depth: all with weights, except for the 1x1 projections."""
    found = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return [m for m in found if getattr(m, "kernel_size", None) != (1, 1)]


def blocks(network):
    return [m for m in network.modules() if isinstance(m, example("image_networks").Block)]


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 56])
def test_a_residual_network_has_its_depth_in_three_stages(depth):
    network = example("image_networks").build(f"resnet{depth}", width=8)
    assert len(layers(network)) == depth
    count = (depth - 2) // 6
    assert [b.conv2.out_channels for b in blocks(network)] == [8] * count + [16] * count + [32] * count
    projections = [(b.projection[0].in_channels, b.projection[0].stride) for b in blocks(network) if b.projection]
    assert projections == [(8, (2, 2)), (16, (2, 2))]


@pytest.mark.parametrize("depth", [4, 7, 10, 13, 25])
def test_a_plain_network_has_its_depth_and_no_shortcuts(depth):
    network = example("image_networks").build(f"plain{depth}", width=4)
    assert len(layers(network)) == depth
    assert not blocks(network)
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet8", "plain4"])
def test_the_stem_halves_the_image_with_a_stride_of_2(name):
    network = example("image_networks").build(name, width=4, stride=2)
    assert network[0](torch.zeros(2, 1, 32, 32)).shape == (2, 4, 16, 16)
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("width", [3, 8])
def test_the_width_sets_the_channels_of_every_stage(width):
    network = example("image_networks").resnet(14, width, classes=7, channels=3)
    x = torch.zeros(2, 3, 32, 32)
    shapes = [(x := module(x)).shape[1:] for module in (network[0], *network[1])]
    assert shapes == [
        *[(width, 32, 32)] * 3, *[(2 * width, 16, 16)] * 2, *[(4 * width, 8, 8)] * 2, (4 * width, 1, 1), (4 * width,),
        (7,),
    ]  # fmt: skip


def test_every_block_of_a_new_network_is_its_shortcut():
    torch.manual_seed(0)
    found = blocks(example("image_networks").resnet(14, 4))
    assert sum(block.projection is None for block in found) == 4
    for block in found:
        x = torch.rand(3, block.conv1.in_channels, 8, 8)  # after a ReLU
        expected = x if block.projection is None else F.relu(block.projection(x))
        assert torch.equal(block(x), expected)
        assert block.conv2.weight.any()
        nn.init.ones_(block.bn2.weight)
        assert not torch.equal(block(x), expected)


def test_gamma_is_the_scale_of_the_last_batch_norm_of_each_block():
    for block in blocks(example("image_networks").resnet(14, 4, gamma=0.5)):
        assert block.bn2.weight.eq(0.5).all()
        norms = [block.bn1] if block.projection is None else [block.bn1, block.projection[1]]
        assert all(norm.weight.eq(1).all() for norm in norms)


def test_projections_and_convolutions_are_initialized_by_the_number_of_outputs():
    torch.manual_seed(0)
    for module in example("image_networks").resnet(8, 32).modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["resnet8", "plain7"])
def test_every_rule_trains_every_layer(name, rule):
    setting = example("tuned").SETTINGS[rule]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(128, 1, 12, 12, generator=generator)
    side = example("cluttered_digits").Images(images, torch.arange(128) % 10, torch.arange(128).unsqueeze(1))
    built = []

    def build(size):
        built.append(example("image_networks").build(name, width=4))
        built.append({key: value.clone() for key, value in built[0].named_parameters()})
        return built[0]

    result = example("two_routes").train(setting, (side, side), epochs=2, seed=0, build=build)
    assert not result.diverged
    network, before = built
    learned = dict(network.named_parameters())
    assert not [key for key, value in before.items() if torch.equal(learned[key], value)]
    # All layers but the stem, and the projections. dfa sends the error of the output to each layer instead.
    expected = 0 if rule in ("bp", "dfa") else {"resnet8": 7 + 2, "plain7": 6}[name]
    assert len(list(pyfeedback.feedback_layers(network))) == expected


def test_the_rules_under_test_are_those_of_the_study():
    assert set(RULES) == set(example("tuned").SETTINGS)


@pytest.mark.parametrize("name", ["resnet9", "resnet2", "plain5", "plain1"])
def test_a_depth_that_does_not_exist_is_named(name):
    with pytest.raises(ValueError, match=f"depth is {re.sub('[a-z]', '', name)}, expected"):
        example("image_networks").build(name)


@pytest.mark.parametrize("name", ["", "resnet", "vgg16", "resnet20b"])
def test_a_network_that_does_not_exist_is_named(name):
    with pytest.raises(ValueError, match=f"model is '{name}', expected resnet8, 14, 20, .* or plain4, 7, 10"):
        example("image_networks").build(name)
