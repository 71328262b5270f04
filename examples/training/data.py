"""Data sets by name."""

from pathlib import Path
from typing import NamedTuple

import image_data
import torch
from torch.utils.data import Dataset, TensorDataset

# Mean and standard deviation of each channel of the training images.
CHANNELS = {
    "mnist": ([0.1307], [0.3081]),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


class Images(NamedTuple):
    """Two data sets of pairs (image [C, H, W] in float32, label), and the number of classes."""

    training: Dataset
    test: Dataset
    classes: int

    @property
    def shape(self) -> torch.Size:
        """The shape [C, H, W] of an image."""
        return self.test[0][0].shape


def load(name: str, root: Path, download: bool = False) -> Images:
    """Load a data set by name. Those of torchvision are read from the folder ``root`` in torchvision's layout.

    Raises:
        ValueError: if the data set is not in ``root``, or torchvision is needed and cannot be imported.
    """
    if name in image_data.NAMES:
        sides = image_data.load(name, root=root)
        return Images(*(TensorDataset(side.images, side.labels) for side in sides), image_data.CLASSES)
    try:
        from torchvision import datasets, transforms
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise ValueError(f"data is {name!r}, which needs torchvision: {str(error).splitlines()[0]}") from None

    shifted = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    cut_out = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    middle = [transforms.Resize(256), transforms.CenterCrop(224)]
    augmented, plain = {
        "mnist": ([], []),
        "cifar10": (shifted, []),
        "cifar100": (shifted, []),
        "imagenet": (cut_out, middle),
    }[name]

    def side(training: bool, steps: list) -> Dataset:
        transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(*CHANNELS[name])])
        if name == "imagenet":
            return datasets.ImageFolder(root / ("train" if training else "val"), transform)
        kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        return kind(root, training, transform, download=download)

    try:
        training, test = side(True, augmented), side(False, plain)
    except (RuntimeError, FileNotFoundError) as error:
        what = f"root is {root}, expected a folder with {name} for torchvision"
        raise ValueError(f"{what}: {str(error).splitlines()[0]}") from None
    if training.classes != test.classes:
        raise ValueError(f"root is {root}, expected the same classes in training and test")
    return Images(training, test, len(training.classes))
