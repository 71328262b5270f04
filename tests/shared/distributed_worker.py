"""One rank of test_distributed.py: python distributed_worker.py FOLDER, with torchrun's environment variables.

Writes the parameters after training, for each wrapper and rule, to FOLDER/<rank>.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from small_networks import classification, pointwise_convnet
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
    "probes": pyfeedback.rule("ia", source="probes", orthogonal=True, tau=8.0, probes=0.5),
    "sampled": pyfeedback.rule("wm", amp=0.1, decay=0.05, center=False, samples=2),
}
FOLLOWED = ("ia", "sa", "kp", "probes")
STEPS, BATCH = 3, 8


def network(rule: str) -> nn.Module:
    """A small converted network. The feedback has its own seed, so all ranks draw the same."""
    model = pointwise_convnet()
    torch.manual_seed(int(torch.randint(100, ())) + (dist.get_rank() if dist.is_initialized() else 0))
    return pyfeedback.convert(model, RULES[rule], init=pyfeedback.Init(seed=3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The joint batches of all ranks."""
    return [classification(step, BATCH) for step in range(STEPS)]


def backward(model: nn.Module, x, target) -> None:
    nn.functional.cross_entropy(model(x), target).backward()


def train(
    model: nn.Module, shards, run=backward, wrap=lambda model: model, first: bool = True, by_gradient: bool = False
) -> dict[str, torch.Tensor]:
    """Train with both optimizers on the shards of this process; return the full parameters.

    With ``first``, the optimizer of the feedback is built before the model is wrapped; otherwise it is built from the
    wrapped model. With ``by_gradient``, autograd computes the gradients that the optimizer would compute itself.
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


def train_followed(
    model: nn.Module, shards, run=backward, wrap=lambda model: model, first: bool = True
) -> dict[str, torch.Tensor]:
    """As :func:`train`, with one optimizer that is followed before the model is wrapped, or afterwards."""
    wrapped = None if first else wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-3)
    pyfeedback.optim.follow(optimizer, model)
    wrapped = wrapped or wrap(model)
    for x, target in shards:
        run(wrapped, x, target)
        assert all(feedback.grad is None for feedback in pyfeedback.feedback_parameters(model))
        optimizer.step()
        optimizer.zero_grad()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}


def views(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def in_two_parts(model, x, target) -> None:
    """Two halves of the batch; only the backward pass of the second synchronizes the ranks."""
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
    for rule in FOLLOWED:
        found["follow ddp", rule] = train_followed(network(rule), mine, wrap=DistributedDataParallel)
        found["follow ddp after", rule] = train_followed(network(rule), mine, wrap=views, first=False)
        found["follow no_sync", rule] = train_followed(network(rule), mine, in_two_parts, DistributedDataParallel)
        found["follow fsdp", rule] = train_followed(fully_shard(network(rule)), mine)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
