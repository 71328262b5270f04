"""Time and peak memory of a whole training step: forward, backward, and the update of W and B; without probes.

`plain` is the unconverted model with torch's fused SGD. `followed` is the converted model with the same optimizer,
which the feedback weights follow; the others have `pyfeedback.optim.SGD`. `reference` is the converted model with the
layers of the reference: the paper's regularizers by autograd. A sample (without --network or --full, or with --quick)
has neither of these two. --compile also compares torch.compile of both models. The multiply-adds of all layers,
relative to backprop, show what a rule costs at least.
"""

import copy

import pytest
import torch
from implementations import SUBJECT
from networks import MODELS, multiply_adds, reference_step, task, training_step
from selection import DTYPES, RULES

import pyfeedback
from pyfeedback.testing import peak_bytes


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
    model, inputs, labels, info = task(network, selection, DTYPES[dtype_name])
    ours = pyfeedback.convert(copy.deepcopy(model), RULES[rule_name])
    torch._dynamo.reset()
    named = {SUBJECT: ours, "plain": model}
    steps = {name: training_step(m, inputs, labels, mode == "compiled") for name, m in named.items()}
    if mode == "eager" and not selection.sampled:
        steps["followed"] = training_step(copy.deepcopy(ours), inputs, labels, followed=True)
        if "reference" in selection.against and RULES[rule_name].learns:
            steps["reference"] = reference_step(copy.deepcopy(ours), inputs, labels)
    for step in steps.values():
        step.run()
    assert all(p.isfinite().all() for p in ours.parameters())
    race(
        "network",
        steps,
        hide_launches=False,
        group=f"{network} {mode} {dtype_name}",
        mode=mode,
        rule=rule_name,
        **info,
        multiply_adds=multiply_adds(model, inputs, RULES[rule_name]),
        peak_bytes={name: peak_bytes(step.run, selection.device) for name, step in steps.items()},
    )
