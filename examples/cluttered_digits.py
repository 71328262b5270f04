"""Two image data sets made from the 1797 handwritten digits shipped with scikit-learn. Nothing is downloaded.

The digits are first split by seed, two thirds for training and one third for testing. Each image, including its
clutter, is made only from digits of its own side of the split.
"""

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

NAMES = ("cluttered", "digits")
CANVAS = 32  # height and width of a cluttered image in pixels
PATCHES = 6  # pieces of other digits in each image
CLUTTER_INK = 0.7  # clutter is fainter than the digit; at full ink even backprop stops near 88 %


class Images(NamedTuple):
    """``images`` [N, 1, H, W] in float32, with ink 1 on paper 0; ``labels`` [N]; ``sources`` [N, 1 + patches].

    ``sources`` are the indices of the digits in an image: first the digit itself, then those of the clutter.
    """

    images: Tensor
    labels: Tensor
    sources: Tensor


def load(
    name: str, seed: int = 0, train_size: int = 6000, test_size: int = 2000, validation: bool = False
) -> tuple[Images, Images]:
    """Return the training set and the test set. The same seed gives the same sets.

    Args:
        name: "digits" for the original 8x8 images, which ignores the sizes; "cluttered" for 32x32 images of a digit
            at twice its size, slightly rotated, at a random position, over pieces of other digits.
        seed: the seed of the split and of the images.
        validation: split the training digits again, five sixths to one sixth, and make both sets from them, so that
            choices made on the second set involve no test digit.

    Raises:
        ValueError: if there is no data set of this name.
    """
    if name not in NAMES:
        raise ValueError(f"data is {name!r}, expected one of {', '.join(NAMES)}")
    generator = torch.Generator().manual_seed(seed)
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(images), generator=generator)
    sides = _split(order, 2 / 3)
    if validation:
        sides = _split(sides[0], 5 / 6)
    if name == "digits":
        return tuple(Images(images[side], labels[side], side.unsqueeze(1)) for side in sides)
    return tuple(
        _cluttered(images, labels, side, size, generator)
        for side, size in zip(sides, (train_size, test_size), strict=True)
    )


def _split(order: Tensor, share: float) -> tuple[Tensor, Tensor]:
    first = int(share * len(order))
    return order[:first], order[first:]


def _cluttered(images: Tensor, labels: Tensor, side: Tensor, size: int, generator: torch.Generator) -> Images:
    """``size`` images made from the digits with indices in ``side``."""
    sources = side[torch.randint(len(side), (size, 1 + PATCHES), generator=generator)]
    canvas = torch.zeros(size, 1, CANVAS, CANVAS)
    for patch in range(1, 1 + PATCHES):
        piece = CLUTTER_INK * _one_quarter(images[sources[:, patch]], generator)
        canvas = torch.maximum(canvas, _placed(piece, reach=0.9, generator=generator))
    canvas = torch.maximum(canvas, _placed(images[sources[:, 0]], reach=0.5, generator=generator))
    return Images(canvas, labels[sources[:, 0]], sources)


def _one_quarter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blank all but one 4x4 quarter of each 8x8 image."""
    quarter = torch.randint(4, (len(images),), generator=generator)
    mask = F.one_hot(quarter, 4).view(-1, 1, 2, 2).float()
    return images * F.interpolate(mask, scale_factor=4)


def _placed(images: Tensor, reach: float, generator: torch.Generator) -> Tensor:
    """Place 8x8 images on a canvas at twice their size, rotated by up to 15 degrees, up to ``reach`` off the center.

    The unit of ``reach`` is half a canvas. At 0.5 the whole digit stays on the canvas; at 0.9 the edge may cut it.
    """
    n = len(images)
    angle = torch.deg2rad(30 * torch.rand(n, generator=generator) - 15)
    shift = reach * (2 * torch.rand(n, 2, generator=generator) - 1)
    zoom = CANVAS / (2 * images.shape[-1])
    rotation = zoom * torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    theta = torch.cat([rotation, -rotation @ shift.unsqueeze(2)], 2)
    grid = F.affine_grid(theta, [n, 1, CANVAS, CANVAS], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
