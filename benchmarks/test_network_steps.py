"""A whole training step: forward, backward, SGD for the weights and FeedbackSGD for the feedback."""

import copy

import networks
import pytest
import torch
from implementations import SUBJECT
from selection import DTYPES, RULES
from timing import Step
from torch.nn import functional as F

import pyfeedback

SIZES = {  # network: (batch, image) for a full run, a quick one, a GPU
    "resnet18": ((8, 224), (16, 64), (128, 224)),
    "resnet20": ((64, 32), (32, 32), (512, 32)),
}
MODELS = {"resnet18": networks.resnet18, "resnet20": networks.resnet20}


@pytest.mark.parametrize("network", list(MODELS))
def test_training_step(race, selection, network, rule_name, dtype_name):
    if network not in selection.networks:
        pytest.skip("not among the networks of this run")
    if RULES[rule_name].transport:
        pytest.skip("backprop is what the others are compared with")
    device, dtype = selection.device, DTYPES[dtype_name]
    batch, image = SIZES[network][1 if selection.quick else 2 if device.type == "cuda" else 0]
    batch = batch if selection.timed else 2
    torch.manual_seed(0)
    model = MODELS[network]().to(device, dtype, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, image, image, device=device).to(dtype, memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 10
    ours = pyfeedback.convert(copy.deepcopy(model), RULES[rule_name])
    steps = {SUBJECT: training_step(ours, images, labels), "plain": training_step(model, images, labels)}
    steps[SUBJECT].run()
    assert all(p.isfinite().all() for p in ours.parameters())
    race(
        "network",
        steps,
        hide_launches=False,
        group=f"{network} {dtype_name}",
        network=network,
        rule=rule_name,
        batch=batch,
        image=image,
        dtype=dtype_name,
    )


def training_step(model, images, labels):
    """The step of a training loop; a model with feedback layers gets the optimizer of their feedback too."""
    optimizers = [torch.optim.SGD(pyfeedback.forward_parameters(model), lr=1e-3, momentum=0.9)]
    if list(pyfeedback.feedback_parameters(model)):
        optimizers.append(pyfeedback.optim.FeedbackSGD(model, lr=1e-6, momentum=0.9))

    def run():
        F.cross_entropy(model(images), labels).backward()
        for optimizer in reversed(optimizers):  # the feedback's first: it reads the gradients of the weights
            optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None

    return Step(run)
