"""The layers of ResNet-50, ViT-B/16 and ConvNeXt-T as the GPU model sees them."""

from typing import NamedTuple

from pyfeedback.core.algorithm import Algorithm, choose_algorithm
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import LINEAR, Convolution, Geometry
from pyfeedback.testing import CONVNEXT_T, RESNET50, ConvShape

FEWEST_CHANNELS = 16  # of pyfeedback.kernels.backward.supports
TOKENS = 197  # of an image of 224x224 in patches of 16x16, and the class token


class Layer(NamedTuple):
    """A layer with a weight; ``input`` is the shape of one sample."""

    name: str
    geometry: Geometry
    input: tuple[int, ...]
    weight: tuple[int, ...]
    repeats: int = 1
    first: bool = False  # the gradient of its input is not needed

    def shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of its input and output."""
        x = (batch, *self.input)
        return x, self.geometry.output_shape(x, self.weight)

    def algorithm(self, batch: int, rule: Coefficients) -> Algorithm:
        """The algorithm of the data terms, with a saved response."""
        return choose_algorithm(self.geometry.sizes((batch, *self.input), self.weight, rule.samples), rule, True)


def convolution(shape: ConvShape) -> Layer:
    """A convolution of pyfeedback.testing."""
    weight = (shape.out_channels, shape.in_channels // shape.groups, shape.kernel, shape.kernel)
    input = (shape.in_channels, shape.map_size, shape.map_size)
    return Layer(shape.name, shape.geometry, input, weight, shape.repeats, shape.in_channels == 3)


def linear(positions: tuple[int, ...], c: int, k: int, repeats: int = 1) -> Layer:
    """A linear layer over the positions of a map or over tokens."""
    return Layer(f"{c}-{k}@{positions[0]}" if positions else f"{c}-{k}", LINEAR, (*positions, c), (k, c), repeats)


def patches(c: int, k: int, size: int, map_size: int) -> Layer:
    """A convolution whose windows do not overlap."""
    geometry = Convolution((size, size))
    name = f"{c}-{k}-{size}x{size}s{size}@{map_size}"
    return Layer(name, geometry, (c, map_size, map_size), (k, c, size, size), 1, c == 3)


NETWORKS: dict[str, tuple[Layer, ...]] = {
    "resnet50": (*map(convolution, RESNET50), linear((), 2048, 1000)),
    "vit_b": (
        patches(3, 768, 16, 224),
        linear((TOKENS,), 768, 2304, 12),
        linear((TOKENS,), 768, 768, 12),
        linear((TOKENS,), 768, 3072, 12),
        linear((TOKENS,), 3072, 768, 12),
        linear((), 768, 1000),
    ),
    "convnext_t": (
        patches(3, 96, 4, 224),
        *(patches(c, 2 * c, 2, size) for c, size in ((96, 56), (192, 28), (384, 14))),
        *map(convolution, CONVNEXT_T),
        *(linear((s.map_size,) * 2, s.in_channels, 4 * s.in_channels, s.repeats) for s in CONVNEXT_T),
        *(linear((s.map_size,) * 2, 4 * s.in_channels, s.in_channels, s.repeats) for s in CONVNEXT_T),
        linear((), 768, 1000),
    ),
}
