"""The order of the images in a run.

The order within an epoch and the augmentation of an image depend only on the seed, the epoch and the image. They do not
depend on the workers, the ranks, or the point of an interruption.
"""

from collections.abc import Iterator
from zlib import crc32

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from training.data import Images
from training.device import Place


def seed_of(*parts: int) -> int:
    """A distinct seed for each tuple of numbers."""
    return crc32(repr(parts).encode())


class Drawn(Dataset):
    """Images by (epoch, index). The augmentation depends only on these and the seed."""

    def __init__(self, images: Dataset, seed: int):
        self.images, self.seed = images, seed

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        generator = torch.default_generator  # torchvision draws from it
        state = generator.get_state()
        generator.manual_seed(seed_of(self.seed, epoch, index))
        try:
            return self.images[index]
        finally:
            generator.set_state(state)


class Order(Sampler):
    """This rank's part of the batches of one epoch, from batch ``start``, as keys of :class:`Drawn`."""

    def __init__(self, length: int, batch: int, seed: int, rank: int, ranks: int):
        self.length, self.batch, self.seed, self.rank, self.ranks = length, batch, seed, rank, ranks
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.length // self.batch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)[: self.length // self.batch * self.batch]
        for chosen in order.split(self.batch)[self.start :]:
            yield [(self.epoch, index) for index in chosen[self.rank :: self.ranks].tolist()]


class Loader:
    """Batches (images, labels) on the device of a place: training images by epoch, or all test images.

    Raises:
        ValueError: if the ranks cannot share a batch equally, or it is larger than the data set.
    """

    def __init__(
        self, images: Images, batch: int, seed: int, place: Place, workers: int = 0, channels_last: bool = False
    ):
        length = len(images.training)
        if batch % place.ranks:
            raise ValueError(f"batch is {batch}, expected a multiple of the {place.ranks} ranks")
        if batch > length:
            raise ValueError(f"batch is {batch}, expected at most the {length} training images")
        self.steps = length // batch
        self.device = place.device
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self._order = Order(length, batch, seed, place.rank, place.ranks)
        options = {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": place.device.type == "cuda",
            "generator": torch.Generator(),  # separate: otherwise every epoch draws from the run's generator
        }
        self._training = DataLoader(Drawn(images.training, seed), batch_sampler=self._order, **options)
        mine = range(place.rank, len(images.test), place.ranks)
        self._test = DataLoader(images.test, batch_size=batch // place.ranks, sampler=mine, **options)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of an epoch, from batch ``start``."""
        self._order.epoch, self._order.start = epoch, start
        return self._moved(self._training)

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of the test images."""
        return self._moved(self._test)

    def _moved(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in loader:
            yield (
                images.to(self.device, non_blocking=True, memory_format=self.format),
                labels.to(self.device, non_blocking=True),
            )
