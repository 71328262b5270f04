"""Direct feedback alignment: a random projection of the error at the output, against formulas by hand."""

import copy
import math
import pickle

import pytest
import torch
from cases import largest_error
from rule_networks import batch, gradients, network
from torch import nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback import Init, Rule


def by_hand(model, projections):
    """The gradients of the network with P e as the error at the input of each layer."""
    x, target = batch()
    conv, _, _, hidden, _, last = model
    a = F.conv2d(x, conv.weight, conv.bias)
    h = a.tanh()
    b = F.linear(h.flatten(1), hidden.weight, hidden.bias)
    g = b.tanh()
    error = 2 * (F.linear(g, last.weight, last.bias) - target) / target.numel()
    at_b = (error @ projections[1].T) * (1 - g**2)
    at_a = (error @ projections[0].T).view_as(a) * (1 - h**2)
    kernel = torch.nn.grad.conv2d_weight(x, conv.weight.shape, at_a)
    found = [kernel, at_a.sum((0, 2, 3)), at_b.T @ h.flatten(1), at_b.sum(0), error.T @ g, error.sum(0)]
    return [t.detach() for t in found]


@pytest.mark.parametrize("rule", ["dfa", Rule(direct="shared")], ids=["each", "shared"])
def test_direct_gradients_by_hand(rule):
    model = network(rule)
    found = gradients(model)
    (projections,) = model.direct_feedback._drawn.values()
    each = projections.split([54, 7])
    if rule != "dfa":
        assert torch.equal(each[0][:7], each[1])
    else:
        assert not torch.equal(each[0][:7], each[1])
    assert each[0].abs().max() <= 3**-0.5
    assert largest_error(found, by_hand(model, each)) < 1e-12


def test_direct_forward_is_the_plain_one():
    x, _ = batch()
    model = network("bp")
    expected = model(x)
    assert torch.equal(pyfeedback.convert(model, "dfa")(x), expected)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_direct_projections_are_sparse_scaled_and_seeded_by_init():
    model = network("dfa", init=Init(density=0.1, scale=2.0, seed=5))
    gradients(model)
    (projection,) = model.direct_feedback._drawn.values()
    assert float((projection != 0).double().mean()) == pytest.approx(0.1, abs=0.06)
    again = network("dfa", init=Init(density=0.1, scale=2.0, seed=5))
    gradients(again)
    assert torch.equal(*(next(iter(m.direct_feedback._drawn.values())) for m in (model, again)))


def test_direct_projections_are_redrawn_only_for_another_seed():
    model = network("dfa")
    gradients(model)
    (first,) = model.direct_feedback._drawn.values()
    model.direct_feedback_seed.copy_(model.direct_feedback_seed.clone())  # as DistributedDataParallel does
    gradients(model)
    assert next(iter(model.direct_feedback._drawn.values())) is first
    model.direct_feedback_seed.add_(1)
    gradients(model)
    assert not torch.equal(next(iter(model.direct_feedback._drawn.values())), first)


@pytest.mark.parametrize("method", ["deepcopy", "pickle", "state_dict"])
def test_direct_copies_have_the_same_gradients(method):
    model = network("dfa")
    expected = gradients(model)
    if method == "state_dict":
        again = network("fa")
        pyfeedback.convert(again, "dfa").load_state_dict(model.state_dict())
    else:
        again = copy.deepcopy(model) if method == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert largest_error(gradients(again), expected) == 0
    assert again.direct_feedback is not model.direct_feedback


def test_direct_loads_a_plain_checkpoint_and_converts_back():
    plain, model = network("bp"), network("dfa")
    model.load_state_dict(plain.state_dict())
    names = set(plain.state_dict())
    assert set(model.state_dict()) == names | {"direct_feedback_seed"}
    assert set(pyfeedback.unconvert(model).state_dict()) == names
    assert largest_error(gradients(model), gradients(plain)) < 1e-12
    other = network("dfa")
    pyfeedback.convert(other, "bp")
    assert largest_error(gradients(other), gradients(plain)) < 1e-12
    assert set(other.state_dict()) == names


def test_direct_of_an_empty_batch():
    model = network("dfa")
    x, _ = batch()
    model(x[:0]).sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_direct_is_refused_where_its_hook_has_no_effect():
    model = network("dfa")
    x, _ = batch()
    parameters = dict(model.named_parameters())
    with pytest.raises(
        RuntimeError, match=r"the model follows dfa, expected another rule under torch\.func, or pyfeed"
    ):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
    with pytest.raises(
        RuntimeError, match=r"the model follows dfa, expected another rule under torch\.export, or pyfe"
    ):
        torch.export.export(model, (x,))


def test_failed_direct_pass_leaves_no_state():
    model = network("dfa")
    expected = gradients(model)
    x, _ = batch()
    handle = model[5].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    assert largest_error(gradients(model), expected) == 0


class Outputs(nn.Module):
    def __init__(self, made):
        super().__init__()
        self.first, self.second, self.made = nn.Linear(4, 4), nn.Linear(4, 3), made

    def forward(self, x):
        return self.made(self.second(self.first(x)))


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda y: (y, y), TypeError, r"^output is tuple, expected one tensor \[N, \.\.\.\]"),
        (lambda y: y.sum(), TypeError, r"^output is shape \(\), expected one tensor"),
        (lambda y: y[:2], ValueError, r"^input of second has shape \(5, 4\) and output \(2, 3\), expected the batch"),
    ],
)
def test_direct_requires_one_output(made, error, message):
    model = pyfeedback.convert(Outputs(made), "dfa")
    with pytest.raises(error, match=message):
        model(torch.randn(5, 4))


def test_direct_alignment_has_gradient_angles():
    found = pyfeedback.alignment(network("dfa"), batch(), F.mse_loss)
    assert found["5"].gradient_angle == pytest.approx(0.0, abs=1e-3)
    assert 30 < found["0"].gradient_angle < 150
    assert math.isnan(found["0"].angle)
    assert math.isnan(found["0"].norm_ratio)
