"""Two image sets made from the 1797 handwritten digits that scikit-learn carries: nothing is downloaded.

The digits are split first, two thirds for training and one third for tests, by seed. Every image of a set is made
from digits of its own side alone, its clutter included.
"""

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

NAMES = ("cluttered", "digits")
CANVAS = 32  # pixels a side of a cluttered image
PATCHES = 6  # pieces of other digits in each
CLUTTER_INK = 0.7  # clutter is fainter than the digit; at full ink backprop itself stops near 88 %


class Images(NamedTuple):
    """``images`` [N, 1, H, W] float32, ink 1 on paper 0; ``labels`` [N]; ``sources`` [N, 1 + patches], see below.

    ``sources`` says which of the 1797 digits an image is made of: the digit itself first, then those of its clutter.
    """

    images: Tensor
    labels: Tensor
    sources: Tensor


def load(
    name: str, seed: int = 0, train_size: int = 6000, test_size: int = 2000, validation: bool = False
) -> tuple[Images, Images]:
    """Training and test set, the same for the same seed.

    Args:
        name: "digits", the 8x8 images as they are (the sizes do not count), or "cluttered", 32x32 images of a digit
            enlarged twice, slightly rotated, at a random place, over pieces of other digits of the same size.
        seed: of the split and of the images.
        validation: split the training digits again, five sixths and one sixth, and make both sets of these: what is
            chosen on the second has seen no test digit.

    Raises:
        ValueError: no set has this name.
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
    """``size`` images made of the digits whose numbers are in ``side``."""
    sources = side[torch.randint(len(side), (size, 1 + PATCHES), generator=generator)]
    canvas = torch.zeros(size, 1, CANVAS, CANVAS)
    for patch in range(1, 1 + PATCHES):
        piece = CLUTTER_INK * _one_quarter(images[sources[:, patch]], generator)
        canvas = torch.maximum(canvas, _placed(piece, reach=0.9, generator=generator))
    canvas = torch.maximum(canvas, _placed(images[sources[:, 0]], reach=0.5, generator=generator))
    return Images(canvas, labels[sources[:, 0]], sources)


def _one_quarter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each 8x8 image with all but one of its 4x4 quarters blank."""
    quarter = torch.randint(4, (len(images),), generator=generator)
    mask = F.one_hot(quarter, 4).view(-1, 1, 2, 2).float()
    return images * F.interpolate(mask, scale_factor=4)


def _placed(images: Tensor, reach: float, generator: torch.Generator) -> Tensor:
    """8x8 images on a canvas: twice enlarged, rotated by up to 15 degrees, their centre up to ``reach`` off the middle.

    ``reach`` is in half-canvases: at 0.5 the whole digit stays on the canvas, at 0.9 it may be cut by the edge.
    """
    n = len(images)
    angle = torch.deg2rad(30 * torch.rand(n, generator=generator) - 15)
    shift = reach * (2 * torch.rand(n, 2, generator=generator) - 1)
    zoom = CANVAS / (2 * images.shape[-1])
    rotation = zoom * torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    theta = torch.cat([rotation, -rotation @ shift.unsqueeze(2)], 2)
    grid = F.affine_grid(theta, [n, 1, CANVAS, CANVAS], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
