"""The configurations of ImageNet on a stage of ResNet-18 and crops of photographs: they train, and B stays bounded."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pyfeedback

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from training.configurations import CONFIGURATIONS

BATCH = 16


sklearn_datasets = pytest.importorskip("sklearn.datasets")


class Residual(nn.Module):
    """A basic block of ResNet-18 at constant width."""

    def __init__(self, channels):
        super().__init__()
        convolutions = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        first, second = ([c, nn.BatchNorm2d(channels)] for c in convolutions)
        self.path = nn.Sequential(*first, nn.ReLU(inplace=True), *second)

    def forward(self, x):
        return torch.relu(self.path(x) + x)


def stage():
    """The stem and the first stage of ResNet-18, and a classifier."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, Residual(64), Residual(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8))


def crops(count, generator):
    """Normalised crops of 64 x 64, and which eighth of the two photographs each is from."""
    photographs = np.stack(sklearn_datasets.load_sample_images().images)
    pixels = torch.from_numpy(photographs).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
    labels = torch.randint(8, (count,), generator=generator)
    images = []
    for label in labels.tolist():
        row, column = (int(torch.randint(n, (), generator=generator)) for n in (427 - 64, 160 - 64))
        column += label % 4 * 160
        images.append(pixels[label // 4, :, row : row + 64, column : column + 64])
    return torch.stack(images), labels


@pytest.mark.parametrize("rule", ["wm", "ia", "sa", "aa", "kp"])
def test_configuration_trains(rule):
    """At the recipe's learning rate for a batch of 256 scaled to this one; B at the full rate, but with W under kp."""
    settings = CONFIGURATIONS[f"imagenet-{rule}"].settings
    model = pyfeedback.convert(stage().to(memory_format=torch.channels_last), settings.rule)
    momentum = {"momentum": settings.momentum, "nesterov": settings.nesterov}
    lr, parameters = settings.lr * BATCH / 256, pyfeedback.forward_parameters(model)
    learner = pyfeedback.optim.FeedbackSGD(model, lr if rule == "kp" else settings.lr, **momentum)
    task = torch.optim.SGD(parameters, lr, weight_decay=settings.weight_decay, **momentum)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(24):
        images, labels = crops(BATCH, generator)
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        learner.step()
        task.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6]), losses
    for name, layer in pyfeedback.alignment(model).items():
        assert 0.05 < layer.norm_ratio < 20, (name, layer)
