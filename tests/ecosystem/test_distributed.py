"""Two processes train like one process on the joint batch: DistributedDataParallel and FSDP2, every rule."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from cases import largest_error

import pyfeedback

pytestmark = pytest.mark.slow  # two processes that import torch and train

PER_RANK = ("centered", "sampled")  # rules with statistics of the batch of each rank


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of two ranks, by wrapper and rule."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(worker.__file__)
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(script), str(folder)]
    running = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]
    for each in running:
        output, _ = each.communicate(timeout=240)
        assert each.returncode == 0, output.decode()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def joined(rule, **options):
    return worker.train(worker.network(rule), worker.batches(), **options)


def error(found, expected):
    assert found.keys() == expected.keys()
    return largest_error(list(found.values()), list(expected.values()))


@pytest.mark.parametrize("rule", worker.RULES)
def test_feedback_is_the_same_on_every_rank(ranks, rule):
    first, second = (found["drawn", rule] for found in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rule", [rule for rule in worker.RULES if rule not in PER_RANK])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_ranks_train_like_one_process_on_the_joint_batch(ranks, wrapper, rule):
    for found in ranks:
        assert error(found[wrapper, rule], joined(rule)) < 1e-5


@pytest.mark.parametrize("rule", ["sa", "kp"])
def test_an_optimizer_of_a_wrapped_model_leaves_the_gradients_to_autograd(ranks, rule):
    for found in ranks:
        assert error(found["ddp before", rule], joined(rule, by_gradient=True)) < 1e-5


@pytest.mark.parametrize("rule", PER_RANK)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_means_and_samples_are_per_rank_and_the_gradients_averaged(ranks, wrapper, rule):
    model, copy = worker.network(rule), worker.network(rule)
    copy.load_state_dict(model.state_dict())

    def average(model, x, target):
        for half, labels in zip(x.chunk(2), target.chunk(2), strict=True):
            (torch.nn.functional.cross_entropy(model(half), labels) / 2).backward()
        for feedback in pyfeedback.feedback_parameters(model):
            feedback.grad /= 2

    expected = worker.train(model, worker.batches(), average)
    for found in ranks:
        assert error(found[wrapper, rule], expected) < 1e-5
    assert error(expected, joined(rule)) > 1e-3  # not the estimate of the joint batch


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_gradients_accumulate_under_no_sync(ranks, rule):
    for found in ranks:
        assert error(found["no_sync", rule], joined(rule)) < 1e-5


@pytest.mark.parametrize("rule", worker.FOLLOWED)
@pytest.mark.parametrize("way", ["ddp", "ddp after", "no_sync", "fsdp"])
def test_two_ranks_with_an_optimizer_that_is_followed(ranks, way, rule):
    """Also if the model was wrapped before, and with gradients that are averaged over two passes."""
    expected = worker.train_followed(worker.network(rule), worker.batches())
    for found in ranks:
        assert error(found[f"follow {way}", rule], expected) < 1e-5
