"""Time and peak memory of a whole training step: forward, backward, and the update of W and B; without probes.

`plain` is the unconverted model with torch's fused SGD. `followed` is the converted model with the same optimizer,
which the feedback weights follow; the others have `pyfeedback.optim.SGD`. `reference` is the converted model with the
layers of the reference: the paper's regularizers by autograd. --compile compares torch.compile of both models.
"""

import copy

import pytest
import torch
from implementations import SUBJECT
from networks import MODELS, reference_step, training_step
from selection import DTYPES, RULES

import pyfeedback
from pyfeedback.testing import peak_bytes

SIZES = {  # network: (batch, image) for a full run, a quick one, a GPU
    "resnet18": ((16, 224), (16, 64), (128, 224)),
    "resnet18-cifar": ((64, 32), (16, 32), (512, 32)),
    "resnet20": ((64, 32), (32, 32), (512, 32)),
    "resnet50": ((16, 224), (8, 64), (128, 224)),
    "demo": ((64, 32), (32, 32), (512, 32)),
    "mlp": ((256, 32), (64, 32), (2048, 32)),
    "vit-tiny": ((8, 224), (4, 64), (128, 224)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # compilers'
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("network", list(MODELS))
def test_training_step(race, selection, network, mode, rule_name, dtype_name):
    if network not in selection.whole_networks:
        pytest.skip("not among the networks of this run")
    if RULES[rule_name].transport:
        pytest.skip("backprop is what the others are compared with")
    if mode == "compiled" and not selection.compiled:
        pytest.skip("without --compile")
    device, dtype = selection.device, DTYPES[dtype_name]
    batch, image = SIZES[network][1 if selection.quick else 2 if device.type == "cuda" else 0]
    batch = batch if selection.timed else 2
    torch.manual_seed(0)
    layout = torch.contiguous_format if selection.contiguous else torch.channels_last
    model = MODELS[network]().to(device, dtype, memory_format=layout)
    images = torch.randn(batch, 3, image, image, device=device).to(dtype, memory_format=layout)
    labels = torch.arange(batch, device=device) % 10
    ours = pyfeedback.convert(copy.deepcopy(model), RULES[rule_name])
    torch._dynamo.reset()
    named = {SUBJECT: ours, "plain": model}
    steps = {name: training_step(m, images, labels, mode == "compiled") for name, m in named.items()}
    if mode == "eager":
        steps["followed"] = training_step(copy.deepcopy(ours), images, labels, followed=True)
    if mode == "eager" and "reference" in selection.against and RULES[rule_name].learns:
        steps["reference"] = reference_step(copy.deepcopy(ours), images, labels)
    for step in steps.values():
        step.run()
    assert all(p.isfinite().all() for p in ours.parameters())
    race(
        "network",
        steps,
        hide_launches=False,
        group=f"{network} {mode} {dtype_name}",
        network=network,
        mode=mode,
        rule=rule_name,
        batch=batch,
        image=image,
        layout="contiguous" if selection.contiguous else "channels_last",
        dtype=dtype_name,
        peak_bytes={name: peak_bytes(step.run, device) for name, step in steps.items()},
    )
