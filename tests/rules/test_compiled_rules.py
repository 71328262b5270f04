"""Models under the rules beyond the paper have the same gradients when they are compiled."""

import pytest
import torch
from cases import largest_error
from rule_networks import batch, gradients, network
from torch.nn import functional as F


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns at a graph break
def test_direct_compiles():
    model = network("dfa")
    expected = gradients(model)
    model.zero_grad()
    torch.compiler.reset()
    x, target = batch()
    F.mse_loss(torch.compile(model, backend="aot_eager")(x), target).backward()
    assert largest_error([p.grad for p in model.parameters()], expected) < 1e-12


@pytest.mark.parametrize("rule", ["usf", "frsf", "brsf", "pfa", "oja"])
def test_every_rule_compiles_whole(rule):
    model = network(rule)
    torch.manual_seed(3)
    expected = gradients(model)
    x, target = batch()
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    F.mse_loss(compiled(x), target).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    if rule == "brsf":  # a compiled graph draws other random numbers
        assert all(torch.isfinite(grad).all() for grad in found)
    else:
        assert largest_error(found, expected) < 1e-10
