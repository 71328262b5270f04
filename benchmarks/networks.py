"""The two networks whose training steps are measured, in the plainest form."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, c: int, k: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c, k, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(k)
        self.conv2 = nn.Conv2d(k, k, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(k)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or c != k:
            self.shortcut = nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, stages of blocks, and a linear classifier on the mean of each channel."""

    def __init__(self, stem: nn.Module, widths: tuple[int, ...], blocks: int, classes: int):
        super().__init__()
        layers, c = [stem], widths[0]
        for stage, k in enumerate(widths):
            for block in range(blocks):
                layers.append(Block(c, k, 2 if stage and not block else 1))
                c = k
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.mean(self.features(x), (2, 3)))


def _stem(c: int, kernel: int, stride: int, *more: nn.Module) -> nn.Sequential:
    conv = nn.Conv2d(3, c, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c), nn.ReLU(inplace=True), *more)


def resnet18() -> ResNet:
    """He et al. 2016, for ImageNet."""
    return ResNet(_stem(64, 7, 2, nn.MaxPool2d(3, 2, 1)), (64, 128, 256, 512), 2, 1000)


def resnet20() -> ResNet:
    """He et al. 2016, for CIFAR, with 1x1 shortcuts."""
    return ResNet(_stem(16, 3, 1), (16, 32, 64), 3, 10)
