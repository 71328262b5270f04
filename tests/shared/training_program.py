"""Helpers for the tests of examples/train.py: short runs in the test process."""

import csv
import importlib
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset, Subset

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAM = EXAMPLES / "train.py"


def part(name):
    """Import a module of the program, which is not a package."""
    return importlib.import_module(f"training.{name}" if name != "train" else name)


def settings(name="digits-ia", **changes):
    """The settings of a configuration, shortened."""
    configuration = part("configurations").CONFIGURATIONS[name]
    return replace(configuration.settings, **{"epochs": 2, "every": 5, "probe": 8, **changes})


def few_digits(training=256, test=64):
    images = part("data").load("digits", Path())
    return part("data").Images(Subset(images.training, range(training)), Subset(images.test, range(test)), 10)


def new_run(chosen, images=None, workers=0):
    return part("loop").Run(chosen, images or few_digits(), part("device").Place(torch.device("cpu")), workers)


def nothing():
    pass


def table(path):
    with open(path, newline="") as file:
        return [{name: v for name, v in row.items() if name != "seconds"} for row in csv.DictReader(file)]


class Noisy(Dataset):
    """Digits with an augmentation that draws from torch's global generator, as torchvision's do."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return image + 0.1 * torch.randn(image.shape), label
