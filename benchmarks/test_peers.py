"""A training step under the rules that BioTorch also has: BioTorch, pyfeedback, and backprop on the plain model.

pip install '.[test,peers]' && pytest benchmarks/test_peers.py --benchmark-only
"""

import copy

import networks
import pytest
import torch
from implementations import SUBJECT, largest_error
from peers import BioTorch, PyFeedback
from timing import Step
from torch import nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback.testing import peak_bytes


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


MODELS = {"mlp": mlp, "resnet20": networks.resnet20, "resnet18-cifar": networks.resnet18_cifar}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf"])
@pytest.mark.parametrize("layout_name", list(LAYOUTS))
@pytest.mark.parametrize("network", list(MODELS))
def test_training_step_beside_biotorch(race, selection, network, layout_name, rule):
    pytest.importorskip("biotorch")
    if network == "mlp" and layout_name == "channels_last":
        pytest.skip("an MLP has no layout")
    batch, layout = 16 if selection.quick else 64, LAYOUTS[layout_name]
    torch.manual_seed(0)
    model = MODELS[network]().to(selection.device, memory_format=layout)
    images = torch.randn(batch, 3, 32, 32, device=selection.device).to(memory_format=layout)
    models = {
        SUBJECT: PyFeedback.convert(copy.deepcopy(model), rule),
        "biotorch": BioTorch.convert(copy.deepcopy(model), rule),
        "plain": model,
    }
    share_feedback(models[SUBJECT], models["biotorch"])
    steps = {name: Step(training_step(each, images)) for name, each in models.items()}
    check(models[SUBJECT], models["biotorch"], images)
    race(
        "peer",
        steps,
        hide_launches=False,
        group="peers",
        network=network,
        layout=layout_name,
        rule=rule,
        batch=batch,
        peak_bytes={name: peak_bytes(step.run, selection.device) for name, step in steps.items()},
    )


def share_feedback(ours, theirs):
    """Copy our feedback weights into BioTorch's layers: magnitudes for frsf, one magnitude per layer for usf."""
    for name, layer in pyfeedback.feedback_layers(ours):
        other, feedback = theirs.get_submodule(name), layer.feedback.detach()
        other.weight_backward.data.copy_(feedback if layer.rule.name == "fa" else feedback.abs())
        other.scaling_factor = float(feedback.abs().max())


def training_step(model, images):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def run():
        backward(model, images)
        optimizer.step()
        optimizer.zero_grad()

    return run


def backward(model, images):
    F.cross_entropy(model(images), torch.arange(len(images), device=images.device) % 10).backward()


def check(ours, theirs, images):
    """Check in float64 that both have the same gradients."""
    gradients = []
    for model in (ours, theirs):
        wide = copy.deepcopy(model).double()
        backward(wide, images[:8].double())
        gradients.append({name: p.grad for name, p in wide.named_parameters() if p.grad is not None})
    assert largest_error(*gradients) < 1e-6  # the one magnitude of usf is a float32 in ours
