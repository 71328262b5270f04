"""The training program: order and augmentation of the images, and the data sets of torchvision."""

import math
import pickle
import struct
from pathlib import Path

import numpy
import pytest
import torch
from torch.utils.data import TensorDataset
from training_program import Noisy, few_digits, part, table

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("example_folder")


# Order and augmentation


def test_ranks_share_each_batch_and_an_epoch_has_every_image_once():
    Order = part("order").Order
    orders = [list(Order(24, 8, 0, rank, 2)) for rank in range(2)]
    assert [len(batch) for order in orders for batch in order] == [4] * 6
    seen = [index for order in orders for batch in order for _, index in batch]
    assert sorted(seen) == list(range(24))
    alone = list(Order(24, 8, 0, 0, 1))
    assert [sorted(a + b) for a, b in zip(*orders, strict=True)] == [sorted(batch) for batch in alone]


def test_the_order_depends_only_on_seed_and_epoch():
    def order(seed=0, epoch=0, start=0):
        made = part("order").Order(30, 8, seed, 0, 1)
        made.epoch, made.start = epoch, start
        assert len(made) == 3 - start
        return [[index for _, index in batch] for batch in made]

    assert order() == order()
    assert order(start=2) == order()[2:]
    assert order(start=3) == []
    assert order(epoch=1) != order() != order(seed=1)


def test_augmentation_does_not_depend_on_the_workers():
    data = part("data")
    images = data.Images(Noisy(TensorDataset(torch.zeros(12, 1, 2, 2), torch.zeros(12))), [0] * 4, 2)
    place = part("device").Place(torch.device("cpu"))

    def epoch(number, start=0, seed=0, workers=0):
        return list(part("order").Loader(images, 4, seed, place, workers).epoch(number, start))

    state = torch.get_rng_state()
    first = epoch(0)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (epoch(0), epoch(0, workers=2)):
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))
    assert torch.equal(epoch(0, start=2)[0][0], first[2][0])
    drawn = torch.stack([images for images, _ in first]).flatten()
    assert len(drawn.unique()) == len(drawn)  # all images differ
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(first, epoch(1), strict=True))


@pytest.mark.parametrize(("batch", "ranks", "named"), [(6, 4, "the 4 ranks"), (400, 1, "at most the 256")])
def test_a_batch_that_does_not_fit_is_named(batch, ranks, named):
    place = part("device").Place(torch.device("cpu"), 0, ranks)
    with pytest.raises(ValueError, match=f"batch is {batch}, expected .*{named}"):
        part("order").Loader(few_digits(), batch, 0, place)


# Tiny data sets in the formats of torchvision


@pytest.fixture
def torchvision():
    return pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))


def write_cifar(root, name):
    """Write the pickles of CIFAR; return the first test image, [3, 32, 32]."""
    fine = name == "cifar100"
    folder = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    folder.mkdir()
    names = ["train", "test"] if fine else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    classes = [str(i) for i in range(100 if fine else 10)]
    meta, key = ("meta", "fine_label") if fine else ("batches.meta", "label")
    (folder / meta).write_bytes(pickle.dumps({f"{key}_names": classes}))
    generator = numpy.random.default_rng(0)
    for file in names:
        data = generator.integers(256, size=(12, 3072), dtype=numpy.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": data, f"{key}s": [i % len(classes) for i in range(12)]}))
    return data[0].reshape(3, 32, 32)


def write_mnist(root):
    """Write the idx files of MNIST; return the first test image."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    generator = numpy.random.default_rng(0)
    for side in ("train", "t10k"):
        images = generator.integers(256, size=(24, 28, 28), dtype=numpy.uint8)
        labels = numpy.arange(24, dtype=numpy.uint8) % 10
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape)
            (folder / f"{side}-{kind}-ubyte").write_bytes(header + values.tobytes())
    return images[:1]


def write_imagenet(root):
    """Write a folder of JPEG files for each class of both sets. Each image has a single color."""
    image = pytest.importorskip("PIL.Image")
    for side in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            (root / side / name).mkdir(parents=True)
            for number in range(8):
                picture = image.new("RGB", (320, 270), (200, 100, 40))
                picture.save(root / side / name / f"{number}.JPEG")
    return numpy.tile(numpy.array([200, 100, 40], dtype=numpy.uint8)[:, None, None], (1, 224, 224))


@pytest.fixture(params=["mnist", "cifar10", "cifar100", "imagenet"])
def folder(request, torchvision, tmp_path, monkeypatch):
    """Name and root of a data set, and the pixels of its first test image."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).exists())
    name = request.param
    writers = {"mnist": write_mnist, "imagenet": write_imagenet}
    pixels = writers[name](tmp_path) if name in writers else write_cifar(tmp_path, name)
    return name, tmp_path, pixels


def test_torchvision_reads_the_files_it_expects(folder):
    name, root, pixels = folder
    data = part("data")
    images = data.load(name, root)
    mean, deviation = (numpy.reshape(values, (-1, 1, 1)) for values in data.CHANNELS[name])
    expected = torch.tensor((pixels / 255 - mean) / deviation, dtype=torch.float32)
    assert images.shape == expected.shape
    tolerance = 0.05 if name == "imagenet" else 1e-5  # JPEG is lossy
    assert torch.allclose(images.test[0][0], expected, atol=tolerance)
    assert images.classes == {"mnist": 10, "cifar10": 10, "cifar100": 100, "imagenet": 2}[name]
    augmented = [image for image, _ in part("order").Drawn(images.training, 0).images]
    assert {image.shape for image in augmented} == {expected.shape}


def test_the_program_trains_on_them(folder, run_program):
    name, root, _ = folder
    models = {"mnist": "resnet8", "cifar10": "resnet8", "cifar100": "mobilenet_v2", "imagenet": "resnet18"}
    run_program(
        "imagenet-sa", "--data", name, "--model", models[name], "--root", root, "--epochs", 1, "--batch", 6,
        "--probe", 4, "--warmup", 0, "--lr", 0.01, "--workers", 1, "--out", root / "run",
    )  # fmt: skip
    (row,) = table(root / "run" / "metrics.csv")
    assert math.isfinite(float(row["train_loss"]))
    assert float(row["gradient_angle"]) > 1


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet"])
def test_a_folder_without_the_data_set_is_named(torchvision, tmp_path, name):
    with pytest.raises(ValueError, match=rf"root is {tmp_path}, expected a folder with {name} for torchvision: .+"):
        part("data").load(name, tmp_path)
