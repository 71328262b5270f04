"""One rank of the runs of test_distributed.py: python distributed_worker.py FOLDER, with torchrun's variables set.

Writes what each wrapper and rule left of the model, by name, to FOLDER/<rank>.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import pyfeedback

RULES = {
    "bp": pyfeedback.rule("bp"),
    "fa": pyfeedback.rule("fa"),
    "wm": pyfeedback.rule("wm", amp=0.1, decay=0.05, center=False),
    "ia": pyfeedback.rule("ia", amp=0.1, null=0.05, decay=0.05, center=False),
    "sa": pyfeedback.rule("sa", self_=0.2, decay=0.2),
    "aa": pyfeedback.rule("aa", amp=0.05, sparse=0.05),
    "kp": pyfeedback.rule("kp"),
    "centered": pyfeedback.rule("ia", amp=0.1, null=0.05, decay=0.05, center=True),
    "sampled": pyfeedback.rule("wm", amp=0.1, decay=0.05, center=False, samples=2),
}
STEPS, BATCH = 3, 8


def network(rule: str) -> nn.Module:
    """A small converted network; the feedback's seed is its own, so that ranks agree whatever they drew before."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 1, bias=False), nn.Flatten(), nn.Linear(96, 4)
    )
    torch.manual_seed(int(torch.randint(100, ())) + (dist.get_rank() if dist.is_initialized() else 0))
    return pyfeedback.convert(model, RULES[rule], init=pyfeedback.Init(seed=3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of all ranks together."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, 2, 4, 4, generator=generator), torch.randint(4, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def backward(model: nn.Module, x, target) -> None:
    nn.functional.cross_entropy(model(x), target).backward()


def train(
    model: nn.Module, shards, run=backward, wrap=lambda model: model, first: bool = True, by_gradient: bool = False
) -> dict[str, torch.Tensor]:
    """Both optimizers over the shards of this process; returns the parameters whole.

    ``first`` builds the feedback's optimizer before the model is wrapped, otherwise of the wrapped one; ``by_gradient``
    has autograd compute what the optimizer would itself.
    """
    wrapped = None if first else wrap(model)
    task = torch.optim.SGD(pyfeedback.forward_parameters(model), lr=0.1, momentum=0.9)
    rule = pyfeedback.optim.FeedbackSGD(wrapped or model, lr=0.1, momentum=0.9)
    for feedback in pyfeedback.feedback_parameters(model):
        feedback.requires_grad_(feedback.requires_grad or by_gradient)
    wrapped = wrapped or wrap(model)
    for x, target in shards:
        run(wrapped, x, target)
        task.step(), rule.step()
        wrapped.zero_grad()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}


def in_two_parts(model, x, target) -> None:
    """Two halves of the batch, of which the second alone is averaged over the ranks."""
    half = len(x) // 2
    with model.no_sync():
        (0.5 * nn.functional.cross_entropy(model(x[:half]), target[:half])).backward()
    (0.5 * nn.functional.cross_entropy(model(x[half:]), target[half:])).backward()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = [(x.chunk(ranks)[rank], target.chunk(ranks)[rank]) for x, target in batches()]
    found = {}
    for rule in RULES:
        model = network(rule)
        found["drawn", rule] = {n: p.detach().clone() for n, p in model.named_parameters()}
        found["ddp", rule] = train(model, mine, wrap=DistributedDataParallel)
        found["fsdp", rule] = train(fully_shard(network(rule)), mine)
    for rule in ("sa", "kp"):
        found["ddp before", rule] = train(network(rule), mine, wrap=DistributedDataParallel, first=False)
    for rule in ("fa", "kp"):
        found["no_sync", rule] = train(network(rule), mine, in_two_parts, DistributedDataParallel)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
