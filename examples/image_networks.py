"""Convolutional networks for small images: residual networks of any depth and width, and plain ones.

Every network is Sequential(stem, body) of plain torch.nn modules. The stem has no layer below it to send an error to,
so only the body is converted: ``pyfeedback.convert(network[1], rule)``.
"""

import re

import tuned
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, added to a shortcut. Where the number of channels grows, pixels are halved.

    There, the shortcut is a 1x1 convolution with batch norm if ``projection`` is True (option B of He et al.).
    Otherwise it has no weights: it subsamples pixels and pads channels with zeros (option A). Elsewhere, it is the
    identity.
    """

    def __init__(self, inputs: int, outputs: int, projection: bool = False):
        super().__init__()
        self.stride, self.new = outputs // inputs, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.projection = None
        if projection and self.new:
            convolution = nn.Conv2d(inputs, outputs, 1, self.stride, bias=False)
            self.projection = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def shortcut(self, x: Tensor) -> Tensor:
        """What is added to the output of the second convolution."""
        if self.projection is not None:
            return self.projection(x)
        if not self.new:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new // 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def stem(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution with batch norm."""
    convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def stages(depth: int, width: int, projection: bool = False) -> list[Block]:
    """Three stages of n blocks with ``width``, 2 * ``width`` and 4 * ``width`` channels, for ``depth`` = 6n + 2.

    Raises:
        ValueError: if there is no such n.
    """
    count, rest = divmod(depth - 2, 6)
    if count < 1 or rest:
        raise ValueError(f"depth is {depth}, expected 8, 14, 20 or another 6n + 2")
    blocks = [Block(width, width) for _ in range(count)]
    for inputs in (width, 2 * width):
        blocks += [Block(inputs, 2 * inputs, projection), *(Block(2 * inputs, 2 * inputs) for _ in range(count - 1))]
    return blocks


def head(inputs: int, classes: int) -> list[nn.Module]:
    """The mean over pixels, and a linear layer."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]


def initialize(network: nn.Module) -> None:
    """Draw the weights of the convolutions (He et al. 2015, arXiv 1502.01852), by the number of outputs."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet(
    depth: int, width: int = 8, classes: int = 10, channels: int = 1, gamma: float = 0.0, stride: int = 1
) -> nn.Sequential:
    """A residual network with ``depth`` = 6n + 2 layers, not counting its two projections.

    ``stride`` is that of the stem. With 2, all other layers see a quarter of the pixels. The last batch norm of each
    block starts with the scale ``gamma``. With 0, a block is its shortcut at the start, and the network is shallow.
    Sources: He et al. 2016 (arXiv 1512.03385), section 4.2, with shortcuts of option B; Goyal
    et al. 2017 (arXiv 1706.02677), section 5.1, for the scale of zero.

    Raises:
        ValueError: if there is no such n.
    """
    blocks = stages(depth, width, projection=True)
    network = nn.Sequential(stem(channels, width, stride), nn.Sequential(*blocks, *head(4 * width, classes)))
    initialize(network)
    for block in blocks:
        nn.init.constant_(block.bn2.weight, gamma)
    return network


def plain(depth: int, width: int = 8, size: int = 32) -> nn.Sequential:
    """The network of tuned.py with ``depth`` = 4 + 3n layers, for ten classes and one channel. It has no shortcuts.

    Raises:
        ValueError: if there is no such n.
    """
    repeats, rest = divmod(depth - 4, 3)
    if repeats < 0 or rest:
        raise ValueError(f"depth is {depth}, expected 4, 7, 10 or another 4 + 3n")
    return tuned.network(size, width, repeats)


def build(name: str, width: int = 8, stride: int = 1) -> nn.Sequential:
    """Build "resnet20" or "plain7", of any depth, for 32x32 images with one channel and ten classes.

    ``stride`` is that of the stem of a residual network. In a plain network it is always 2.

    Raises:
        ValueError: if there is no network of this name.
    """
    kind, depth = re.fullmatch(r"(resnet|plain)(\d+)|.*", name).groups()
    if kind is None:
        raise ValueError(f"model is {name!r}, expected resnet8, 14, 20, ... or plain4, 7, 10, ...")
    return resnet(int(depth), width, stride=stride) if kind == "resnet" else plain(int(depth), width)
