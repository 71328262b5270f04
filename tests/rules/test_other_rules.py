"""The rules beyond the paper: sign-symmetry, product and direct feedback alignment, and mixtures, by formula."""

import copy
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from cases import largest_error
from small_networks import convnet, regression
from torch import nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback import Init, Rule, reference
from pyfeedback.optim import SGD, AdamW, FeedbackSGD
from pyfeedback.rules import PRESETS
from pyfeedback.schedules import GrowthControl

SIGNED = ("usf", "frsf", "brsf")


def network(rule, **options):
    return pyfeedback.convert(convnet(6, 5, 7).double(), rule, **options)


def batch():
    return regression(count=4, side=5)


def gradients(model):
    model.zero_grad()
    x, target = batch()
    F.mse_loss(model(x), target).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# Sign-symmetry: B = M sign(W)


@pytest.mark.parametrize("rule", SIGNED)
def test_input_gradient_has_the_signs_of_the_weight(rule):
    torch.manual_seed(0)
    layer = pyfeedback.nn.Conv2d(3, 4, 3, padding=1, rule=rule, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    grad_output = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.neg_()  # the signs are read in the forward pass
    torch.manual_seed(2)
    layer(x).backward(grad_output)
    torch.manual_seed(2)
    magnitude = layer.feedback.abs()
    if rule == "brsf":
        magnitude = magnitude * torch.randn_like(magnitude).abs()
    leaf = x.detach().requires_grad_()
    output, _ = reference.conv2d(leaf, layer.weight.detach(), magnitude * layer.weight.sign(), layer.bias, padding=1)
    output.backward(grad_output)
    torch.testing.assert_close(x.grad, leaf.grad)
    assert layer.feedback.grad is None


def test_magnitudes():
    drawn = pyfeedback.nn.Linear(40, 30, rule="fa", init=Init(seed=3))
    uniform = pyfeedback.nn.Linear(40, 30, rule="usf", init=Init(seed=3))
    fixed = pyfeedback.nn.Linear(40, 30, rule="frsf", init=Init(seed=3))
    torch.testing.assert_close(uniform.feedback, drawn.feedback.square().mean().sqrt().expand(30, 40))
    assert torch.equal(fixed.feedback, drawn.feedback)
    assert torch.equal(fixed.effective_feedback(), drawn.feedback.abs() * fixed.weight.sign())
    assert fixed.effective_feedback() is not fixed.feedback


def test_batch_random_magnitudes_are_drawn_only_in_passes_with_gradients():
    layer = pyfeedback.nn.Linear(40, 30, rule="brsf")
    first, second = layer.effective_feedback(), layer.effective_feedback()
    assert not torch.equal(first, second)
    assert torch.equal(first.sign(), second.sign())
    assert first.square().mean().sqrt() == pytest.approx(float(layer.feedback[0, 0]), rel=0.1)
    state = torch.get_rng_state()
    with torch.no_grad():
        layer(torch.randn(2, 40, generator=torch.Generator().manual_seed(0)))
    pyfeedback.alignment(layer)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rule", SIGNED)
def test_signs_align(rule):
    """The cosine between sign(W) and a normal W is sqrt(2 / pi); with independent magnitudes it is 2 / pi."""
    torch.manual_seed(0)
    layer = nn.Linear(300, 200)
    nn.init.normal_(layer.weight)
    pyfeedback.convert(layer, rule)
    expected = {"usf": 37.07, "frsf": 50.46, "brsf": 37.07}[rule]
    assert pyfeedback.alignment(layer)[""].angle == pytest.approx(expected, abs=0.5)


# Product feedback alignment: B = P R, R.grad = P' (tie dL/dW) + decay R


@pytest.mark.parametrize("expansion", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_product_against_autograd(expansion, groups):
    torch.manual_seed(0)
    rule = Rule(tie=0.7, decay=0.2, expansion=expansion)
    layer = pyfeedback.nn.Conv2d(4, 6, 3, groups=groups, rule=rule, dtype=torch.float64)
    assert layer.feedback.shape == (6 * expansion, 4 // groups, 3, 3)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    leaf, factor = x.detach().requires_grad_(), layer.feedback.detach().clone().requires_grad_()
    weight = layer.weight.detach().requires_grad_()
    product = torch.einsum("km,mcrs->kcrs", layer.mixing, factor)
    output, _ = reference.conv2d(leaf, weight, product, layer.bias, groups=groups, tie=0.7)
    (output.square().sum() + 0.1 * factor.square().sum()).backward()
    found = [x.grad, layer.weight.grad, layer.feedback.grad]
    assert largest_error(found, [leaf.grad, weight.grad, factor.grad]) < 1e-12


@pytest.mark.parametrize("optimizer", [FeedbackSGD, SGD, AdamW])
def test_optimizers_step_the_factor_as_autograd_would(optimizer):
    """The optimizer computes the gradient of the factor from that of the weight, in place of autograd."""
    ours, plain = network("pfa"), network("pfa")
    plain.load_state_dict(ours.state_dict())
    step = optimizer(ours, lr=0.1)
    gradients(plain), gradients(ours)
    assert ours[3].feedback.grad is None
    step.step()
    with torch.no_grad():
        for mine, theirs in zip(
            pyfeedback.feedback_parameters(ours), pyfeedback.feedback_parameters(plain), strict=True
        ):
            if optimizer is AdamW:  # decoupled weight decay
                pulled = theirs.grad - 2e-3 * theirs
                expected = theirs * (1 - 0.1 * 2e-3) - 0.1 * pulled / (pulled.abs() + 1e-8)
            else:
                expected = theirs - 0.1 * theirs.grad
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_the_product_converges_to_the_weight():
    """Both decay at the same rate and take the same steps: Kolen-Pollack through a random matrix."""
    torch.manual_seed(0)
    layer = pyfeedback.nn.Linear(20, 15, rule=pyfeedback.rule("pfa", decay=0.1, expansion=8))
    optimizer = SGD(layer, lr=0.1, weight_decay=0.1)
    angles = []
    for _ in range(400):
        x = torch.randn(16, 20)
        optimizer.zero_grad()
        F.mse_loss(layer(x), x[:, :15]).backward()
        optimizer.step()
        angles.append(pyfeedback.alignment(layer)[""].angle)
    assert angles[0] > 80
    assert angles[-1] < 25


def test_product_under_torch_func():
    model = network("pfa")
    x, target = batch()
    parameters = dict(model.named_parameters())

    def loss(parameters, x, target):
        return F.mse_loss(torch.func.functional_call(model, parameters, (x[None],)), target[None])

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, target)
    for i in range(len(x)):
        expected = torch.autograd.grad(loss(parameters, x[i], target[i]), list(parameters.values()))
        assert largest_error([grads[i] for grads in found.values()], list(expected)) < 1e-12


def test_product_checkpoints():
    model = network("pfa")
    again = network("fa")
    pyfeedback.convert(again, "pfa")
    again.load_state_dict(model.state_dict())
    assert largest_error(gradients(again), gradients(model)) == 0
    assert not [name for name in pyfeedback.unconvert(model).state_dict() if "feedback" in name or "mixing" in name]


# Direct feedback alignment: a random projection of the output error


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


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns at a graph break
def test_direct_compiles():
    model = network("dfa")
    expected = gradients(model)
    model.zero_grad()
    torch.compiler.reset()
    x, target = batch()
    F.mse_loss(torch.compile(model, backend="aot_eager")(x), target).backward()
    assert largest_error([p.grad for p in model.parameters()], expected) < 1e-12


@pytest.mark.parametrize("rule", [*SIGNED, "pfa", "oja"])
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


# Mixtures


def test_a_mixture_by_name():
    model = network({"0": "ia", "3": pyfeedback.rule("kp", decay=0.0)})
    assert [type(m).__module__.startswith("pyfeedback") for m in (model[0], model[3], model[5])] == [True, True, False]
    assert (model[0].rule.name, model[3].rule.decay) == ("ia", 0.0)
    _, report = pyfeedback.convert(model, {"[03]": "wm", "*": "usf"}, return_report=True)
    assert [model[i].rule.name for i in (0, 3, 5)] == ["wm", "wm", "usf"]
    assert report.changed == ["0", "3", "5"]
    assert str(report).startswith(
        "3 layers follow [03] wm(decay=0.002, amp=0.001, center=True), usf(signs=uniform): 0, 3"
    )


def test_a_mixture_reports_layers_without_a_pattern():
    _, report = pyfeedback.convert(network("bp"), {"0": "ia"}, return_report=True)
    assert report.left == {
        "3": "no pattern of the rules matches its name",
        "5": "no pattern of the rules matches its name",
    }


def test_direct_layers_in_a_mixture():
    model = network({"0": "fa", "*": "dfa"})
    gradients(model)
    ((names, *_),) = model.direct_feedback._drawn
    assert names == (("3", 54), ("5", 7))


# Bad rules


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"signs": "random"}, "signs is 'random', expected one of free, uniform, fixed, batch"),
        ({"direct": True}, "direct is True, expected one of no, each, shared"),
        ({"expansion": -1}, "expansion is -1, expected an int of 0 or more"),
        ({"expansion": 2, "amp": 1.0}, "expansion is 2 in .*, expected no coefficients but tie and decay"),
        ({"signs": "fixed", "decay": 1.0}, "signs is fixed and direct no in .*, expected no coefficients"),
        ({"signs": "fixed", "direct": "each"}, "more than one of transport, signs, direct and expansion"),
    ],
)
def test_bad_rules(fields, message):
    with pytest.raises(ValueError, match=message):
        Rule(**fields)


# Growth control


def test_growth_control_sets_the_spread_of_what_noise_excites():
    """The variance of B' u over the units, averaged over u uniform in [0, 1), has a closed form."""
    torch.manual_seed(0)
    model = network("wm")
    control = GrowthControl(model, std=0.5)
    with torch.no_grad():
        for b in pyfeedback.feedback_parameters(model):
            b.mul_(30)
    control.step()
    for b in pyfeedback.feedback_parameters(model):
        made = torch.rand(20000, b.shape[0], dtype=torch.float64) @ b.detach().flatten(1)
        assert float(made.var(1, correction=0).mean().sqrt()) == pytest.approx(0.5, rel=0.02)


# The rules in the documentation


def documented():
    text = (Path(__file__).parents[2] / "docs" / "rules.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        assert len(block.splitlines()) < 20
        exec(block, names)
    return names


def test_the_table_has_every_rule():
    table = re.findall(r"^\| `([\w-]+)`", (Path(__file__).parents[2] / "docs" / "rules.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(PRESETS)


def test_documented_rule_takes_fewer_samples_in_aligned_layers():
    model = network("ia")
    with torch.no_grad():
        model[3].feedback.copy_(model[3].weight)
    documented()["attend"](model)
    assert [model[i].rule.samples for i in (0, 3, 5)] == [0, 0.0625, 0]


def test_documented_rule_adds_its_term():
    plain, model = network("wm"), network("wm")
    model.load_state_dict(plain.state_dict())
    documented()["normalize"](model, strength=0.5)
    gradients(plain), gradients(model)
    b, w = model[3].feedback.detach(), model[3].weight.detach()
    torch.testing.assert_close(model[3].feedback.grad, plain[3].feedback.grad + 0.5 * b * (1 - w.norm() / b.norm()))
