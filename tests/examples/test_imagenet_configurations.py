"""The ImageNet settings of rules whose feedback learns are stable on photographs at their learning rate of 0.1.

ImageNet itself is not used. The images are crops of the two photographs shipped with scikit-learn, the network is the
ResNet-18 of the settings or its first stage, and the label of a crop is its photograph.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training_program import part

import pyfeedback

pytestmark = pytest.mark.usefixtures("example_folder")

RULES = ("wm", "ia", "aa", "wm-probes", "ia-probes", "aa-probes")


class Block(nn.Module):
    """The basic block of torchvision's ResNet-18."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return F.relu(y + self.downsample(x))


def resnet(*widths):
    """torchvision's ResNet-18 with widths 64, 128, 256 and 512, or its first stages."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks, inputs = [], 64
    for outputs in widths:
        blocks += [Block(inputs, outputs, outputs // inputs), Block(outputs, outputs, 1)]
        inputs = outputs
    network = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 2))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


@pytest.fixture(scope="module")
def photographs():
    """Two images [3, 427, 640], normalized as in the data set of the settings."""
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return [(torch.tensor(image.copy()).permute(2, 0, 1) / 255 - mean) / deviation for image in images]


def crops(photographs, count, size, generator):
    """Random crops scaled to ``size``, half of them mirrored, and the index of the photograph of each."""

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    images, labels = [], []
    for _ in range(count):
        label, side = draw(0, 2), draw(64, 400)
        top, left = draw(0, 428 - side), draw(0, 641 - side)
        crop = photographs[label][:, top : top + side, left : left + side]
        crop = F.interpolate(crop[None], size=(size, size), mode="bilinear", antialias=True)[0]
        images.append(crop.flip(2) if draw(0, 2) else crop)
        labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def settings(rule):
    return part("configurations").CONFIGURATIONS[f"imagenet-{rule}"].settings


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_thirty_steps_at_the_full_learning_rate(rule, photographs):
    """Without the warm-up of the settings. With the authors' coefficients, wm, ia and aa diverge."""
    torch.manual_seed(0)
    chosen, generator = settings(rule), torch.Generator().manual_seed(0)
    network = part("models").convert(resnet(64), chosen.rule)
    optimizers = part("recipe").optimizers(chosen, network)
    losses, ratios = [], []
    for _ in range(30):
        images, labels = crops(photographs, 16, 64, generator)
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        part("recipe").step(optimizers, chosen.lr)
        losses.append(loss.item())
        ratios += [reading.norm_ratio for reading in pyfeedback.alignment(network).values()]
    assert chosen.lr == 0.1
    assert all(map(math.isfinite, losses))
    assert min(ratios) > 0
    assert max(ratios) < 2
    assert sum(losses[-10:]) < 0.25 * sum(losses[:10])


def layers_in_use(network, images):
    """Each layer except the first, with its input and its response in one pass."""
    seen = {}

    def remember(name):
        def hook(module, inputs, output):
            seen.setdefault(name, (module, inputs[0].detach(), output.detach()))

        return hook

    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name != "0":
            module.register_forward_hook(remember(name))
    network(images)
    return seen


def largest_eigenvalue(layer, input, rule):
    """The largest eigenvalue of the Hessian of the regularizer in B, without decay, by ten power iterations."""
    options = {"samples": 0, "center": rule.center, "null": rule.null, "sparse": rule.sparse}
    arguments = ()
    if isinstance(layer, nn.Conv2d):
        arguments = (layer.stride, layer.padding, layer.dilation, layer.groups)
    positions = layer(input)[0].numel() // layer.weight.shape[0]
    backward = torch.ops.pyfeedback.fa_conv2d_backward if arguments else torch.ops.pyfeedback.fa_linear_backward
    output, found = torch.zeros_like(layer(input)), 0.0
    vector = torch.randn_like(layer.weight)
    for _ in range(10):
        vector = vector / vector.norm()
        mask = [False, False, True, False]
        with torch.no_grad():
            vector = backward(output, input, layer.weight, vector, None, *arguments, output_mask=mask, **options)[2]
        found = vector.norm().item() / positions
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["ia", "aa"])
def test_steps_are_far_from_where_they_diverge(rule, photographs):
    """lr * lambda / (1 - momentum) < 2 with a margin, for the largest curvature over the layers of a new network.

    The margin allows for activations that grow during training.
    """
    torch.manual_seed(0)
    chosen = settings(rule)
    assert chosen.rule.reduction == "mean"
    images, _ = crops(photographs, 8, 96, torch.Generator().manual_seed(1))
    found = {}
    for name, (layer, input, _) in layers_in_use(resnet(64, 128, 256, 512), images).items():
        found[name] = chosen.lr * largest_eigenvalue(layer, input, chosen.rule) / (1 - chosen.momentum)
    assert len(found) == 20
    assert max(found.values()) < 2 / 5, found
    assert max(found.values()) > 2 / 200, found  # otherwise the steps are too small


def test_the_authors_own_coefficients_diverge(photographs):
    """As the comment in the settings states."""
    for rule in ("ia", "aa"):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        network = part("models").convert(resnet(64), pyfeedback.rule(rule))
        optimizers = part("recipe").optimizers(settings(rule), network)
        for _ in range(6):
            images, labels = crops(photographs, 16, 64, generator)
            F.cross_entropy(network(images), labels).backward()
            part("recipe").step(optimizers, 0.1)
        ratios = [reading.norm_ratio for reading in pyfeedback.alignment(network).values()]
        assert any(not ratio < 1e3 for ratio in ratios)
