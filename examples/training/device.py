"""The device of a run, and its rank among the processes of torchrun."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Place:
    """A device, the rank of this process, and the number of processes."""

    device: torch.device
    rank: int = 0
    ranks: int = 1

    @property
    def first(self) -> bool:
        """True in the process that writes files."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Average the gradients over the ranks."""
        return DistributedDataParallel(model) if self.ranks > 1 else model

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def random_states(self) -> list[Tensor]:
        """The state of the GPU's generator on every rank; empty on CPUs, where all ranks draw the same numbers."""
        if self.device.type != "cuda":
            return []
        states = [torch.cuda.get_rng_state().to(self.device)]
        if self.ranks > 1:
            mine, states = states[0], [torch.empty_like(states[0]) for _ in range(self.ranks)]
            dist.all_gather(states, mine)
        return [state.cpu() for state in states]


def choose(name: str | None = None) -> torch.device:
    """The device of this name. The default is a GPU if there is one; under torchrun, the GPU of the local rank.

    Raises:
        ValueError: if there is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}: {str(error).splitlines()[0]}") from None


@contextmanager
def joined(device: torch.device, deterministic: bool = False) -> Iterator[Place]:
    """A context manager that joins the process group of torchrun, if there is one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by deterministic cuBLAS
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Place(device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Place(device, dist.get_rank(), dist.get_world_size())
    finally:
        # A DistributedDataParallel destroyed after its group blocks while it holds the GIL: a gloo thread needs
        # the GIL (torch 2.13).
        gc.collect()
        dist.destroy_process_group()
