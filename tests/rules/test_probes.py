"""Rules that read white noise of one receptive field: the gradient, its noise, and the optimizers' steps."""

import copy
import math

import pytest
import torch
from torch import nn

import pyfeedback
from pyfeedback.backends.composite.probes import probe_gradient, random_signs
from pyfeedback.core.coefficients import Coefficients


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# The number of probes


@pytest.mark.parametrize(("inputs", "tau", "probes"), [(72, 20, 10), (64, 8, 20), (100, 40, 3), (30, 5, 30)])
def test_the_noise_of_orthogonal_probes_is_as_predicted(inputs, tau, probes):
    """The tangent of the angle is averaged over steps and seeds; independent probes have several times more noise."""
    torch.manual_seed(0)
    rule = pyfeedback.rule("wm", source="probes", orthogonal=True, tau=tau, probes=probes)
    model = pyfeedback.convert(nn.Linear(inputs, 40, bias=False), rule)
    optimizer = pyfeedback.optim.FeedbackSGD(model, lr=1.0)
    found = []
    for step in range(20 * tau + 200):
        optimizer.step()
        if step >= 12 * tau:
            found.append(math.tan(math.radians(angles(model).item())) ** 2)
    predicted = optimizer.probe_counts()[""].noise_floor
    assert sum(found) / len(found) == pytest.approx(predicted**2, rel=0.15, abs=1e-6)
    assert predicted < 0.6 * (inputs / (2 * tau * probes)) ** 0.5


def test_a_sweep_of_orthogonal_probes_sums_to_w():
    """Its parts may have different sizes; each probe counts the same."""
    torch.manual_seed(0)
    model = pyfeedback.convert(
        nn.Conv2d(3, 4, 3).double(), pyfeedback.rule("wm", source="probes", orthogonal=True, tau=4.0, probes=8, every=2)
    )
    optimizer = pyfeedback.optim.SGD(model, lr=0.0)
    assert optimizer.probe_counts()[""].sweep == 4  # 27 inputs
    b, moved = model.feedback.detach().clone(), torch.zeros_like(model.feedback)
    for step in range(8):
        optimizer.step()
        after = model.feedback.detach().clone()
        # B <- (1 - every / tau) B + every / tau (estimate), and the mean estimate of a sweep is W
        moved += (after - (1 - (step % 2 == 0) / 2) * b) / 0.5 * (step % 2 == 0)
        b = after
    torch.testing.assert_close(moved / 4, model.weight.detach())


@pytest.mark.parametrize(("inputs", "exact"), [(64, True), (60, False)])
def test_aa_copies_each_direction_once_in_tau_steps(inputs, exact):
    """W - B loses what a basis of 64 spans in its 16 parts. Without the last columns, they are not quite orthogonal."""
    torch.manual_seed(0)
    rule = pyfeedback.rule("aa", source="probes", orthogonal=True, tau=16.0)
    model = pyfeedback.convert(nn.Linear(inputs, 40, bias=False).double(), rule)
    optimizer = pyfeedback.optim.FeedbackSGD(model, lr=1.0)
    assert optimizer.probe_counts()[""][:2] == (4, 4)
    start, lost = (model.weight - model.feedback).detach(), []
    for _ in range(16):
        before = (model.weight - model.feedback).detach()
        optimizer.step()
        after = (model.weight - model.feedback).detach()
        lost.append(1 - (after.square().sum() / before.square().sum()).item())
        if exact:  # a projection
            torch.testing.assert_close((before - after).square().sum(), before.square().sum() - after.square().sum())
    assert torch.allclose(after, torch.zeros_like(after), atol=1e-12) == exact
    assert after.norm() < 0.1 * start.norm()
    assert min(lost) > 0


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("probes", [0, 1, 7])
def test_aa_is_stable_with_any_number_of_probes(probes, orthogonal):
    """Its time constant is that of the rule, or as long as its probes need."""
    torch.manual_seed(0)
    rule = pyfeedback.rule("aa", source="probes", orthogonal=orthogonal, tau=10.0, probes=probes)
    model = pyfeedback.convert(nn.Linear(128, 40, bias=False), rule)
    optimizer = pyfeedback.optim.FeedbackSGD(model, lr=1.0)
    tau = optimizer.time_constants()[""]
    assert tau == pytest.approx({0: 10 if orthogonal else 11, 7: 19, 1: 129 - orthogonal}[probes], rel=0.05)
    error = []
    for _ in range(round(3 * tau)):
        error.append((model.weight - model.feedback).norm().item())
        optimizer.step()
    assert error[-1] / error[0] < math.exp(-3 / 2) + 0.01  # of independent ones, the mean square shrinks with tau
    assert max(error) == error[0]


def test_the_number_of_probes_of_a_model_follows_its_batch():
    model = pyfeedback.convert(nn.Conv2d(8, 4, 3, padding=1), pyfeedback.rule("wm", source="probes", tau=20))
    optimizer = pyfeedback.optim.SGD(model, lr=0.1)
    assert optimizer.probe_counts()[""].probes == optimizer.probe_counts()[""].wanted == 180
    model(torch.randn(2, 8, 10, 10))
    assert optimizer.probe_counts()[""].probes == 20  # for 0.3 radians; 3 % of 200 positions would be 6
    model(torch.randn(20, 8, 10, 10))
    assert optimizer.probe_counts()[""].probes == 60  # 3 % of 2,000
    model(torch.randn(200, 8, 10, 10))
    assert optimizer.probe_counts()[""].probes == 180


def test_the_number_of_probes_is_that_of_other_processes_whose_batch_is_another(monkeypatch):
    model = pyfeedback.convert(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), "ia-probes")
    optimizer, found = pyfeedback.optim.SGD(model, lr=0.1), []
    for ranks in (1, 2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda ranks=ranks: ranks > 1)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda ranks=ranks: ranks)
        for samples in (1, 500):
            model(torch.randn(samples, 8, 6, 6)).sum().backward()
            found.append(optimizer.probe_counts()["0"])
    assert found[0].probes < found[1].probes < found[1].wanted
    assert found[2] == found[3]
    assert found[2].probes == found[2].wanted


def test_noise_that_hides_w_is_reported_once(caplog):
    model = pyfeedback.convert(nn.Conv2d(8, 4, 3), pyfeedback.rule("wm", source="probes", tau=20, probes=1))
    optimizer = pyfeedback.optim.SGD(model, lr=0.1)
    optimizer.step(), optimizer.step()
    (record,) = [r for r in caplog.records if "the noise of the probes" in r.message]
    assert f" {math.degrees((72 / 40) ** 0.5):.0f};" in record.message


# Layers


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), (5, 12)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 5), (2, 4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), (2, 2, 5, 5, 5)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 6, 6)),
    "channels_last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2), (2, 6, 4, 4)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (2, 6, 4, 4)),
    "attention": (Attention, (2, 5, 8)),
}


def angles(model):
    return torch.tensor([found.angle for found in pyfeedback.alignment(model).values()])


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_finds_its_weight_by_a_whole_basis(name):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    model = pyfeedback.convert(build(), pyfeedback.rule("wm", source="probes", orthogonal=True, tau=1.0, probes=2.0))
    model(torch.randn(shape)).sum().backward()
    pyfeedback.optim.FeedbackSGD(model, lr=1.0).step()
    for _, layer in pyfeedback.feedback_layers(model):
        torch.testing.assert_close(layer.feedback, layer.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_matrices_of_a_layer(name):
    """They are views of its memory, in channels_last as well."""
    build, _ = LAYERS[name]
    for layer in (layer for _, layer in pyfeedback.feedback_layers(pyfeedback.convert(build(), "wm-probes"))):
        matrices = layer.as_matrices(layer.weight)
        assert matrices.data_ptr() == layer.weight.data_ptr()
        back = layer.from_matrices(matrices)
        assert torch.equal(back, layer.weight)
        assert back.stride() == layer.weight.stride()


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_finds_its_weight(name):
    """The angle of the weight mirror ends at the noise floor, and that of aa at zero.

    The floor is sqrt(d / (2 tau M)) radians; of d moments, that of the input with itself has no noise.
    """
    build, shape = LAYERS[name]
    for rule in ("wm", "aa"):
        torch.manual_seed(0)
        model = pyfeedback.convert(build(), pyfeedback.rule(rule, source="probes", tau=20, probes=4.0))
        model(torch.randn(shape)).sum().backward()
        optimizer = pyfeedback.optim.FeedbackSGD(model, lr=1.0)
        found = []
        for step in range(300):
            optimizer.step()
            if step >= 160 and step % 7 == 0:
                found.append(angles(model))
        mean, sizes = torch.stack(found).mean(0), []
        for _, layer in pyfeedback.feedback_layers(model):
            sizes.append(layer.as_matrices(layer.weight).shape[-1])
        expected = torch.tensor([math.degrees(((d - 1) / d / (2 * 20 * 4)) ** 0.5) * (rule == "wm") for d in sizes])
        assert ((mean - expected).abs() < 0.25 * expected + 0.1).all(), (rule, mean, expected)
        for measured in pyfeedback.alignment(model).values():
            assert measured.norm_ratio == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("nu", [0.5, 1.0, 3.0])
def test_information_alignment_ends_at_its_fixed_point(nu):
    """B = (1 + nu) (1 + nu N / q)^-1 W, with N = W W' and q the Rayleigh quotient of N at B; |B| is about |W|."""
    torch.manual_seed(0)
    model = pyfeedback.convert(
        nn.Linear(30, 12).double(), pyfeedback.rule("ia", source="probes", tau=40, nu=nu, probes=60.0)
    )
    optimizer = pyfeedback.optim.FeedbackSGD(model, lr=1.0)
    for _ in range(400):
        optimizer.step()
    w, b = model.weight.detach(), model.feedback.detach()
    moment = w @ w.t()
    expected = w
    for _ in range(200):
        q = (expected * (moment @ expected)).sum() / expected.square().sum()
        expected = (1 + nu) * torch.linalg.solve(torch.eye(12).double() + nu * moment / q, w)
    assert (b - expected).norm() / expected.norm() < 0.03  # the noise floor is 0.014
    assert b.norm() / w.norm() == pytest.approx(1.0, abs=0.15)


# The step


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))


def converted(**changes):
    rule = pyfeedback.rule(changes.pop("name", "ia"), **{"source": "probes", "tau": 8.0, "probes": 2.0, **changes})
    return pyfeedback.convert(network(), rule, init=pyfeedback.Init(seed=1))


def batch(seed):
    return torch.randn(4, 3, 6, 6, generator=generator(seed))


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        model(batch(seed)).square().mean().backward()
        optimizer.step()


def sgd(model, **options):
    return pyfeedback.optim.SGD(model, **{"lr": 0.01, "momentum": 0.9, **options})


def feedback_of(model):
    return [b.detach().clone() for b in pyfeedback.feedback_parameters(model)]


def test_autograd_does_nothing_for_the_rule():
    model = converted()
    assert not any(b.requires_grad for b in pyfeedback.feedback_parameters(model))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        model[0](batch(0))
    assert sorted(map(tuple, saved)) == sorted([(4, 3, 6, 6), (8, 3, 3, 3), (8, 3, 3, 3)])  # x, W and B: no response


def test_the_step_reads_nothing_of_the_batch():
    found = []
    for seed in (0, 1):
        model = converted()
        optimizer = pyfeedback.optim.FeedbackSGD(model, lr=1.0)
        train(model, optimizer, [seed])
        found.append(feedback_of(model))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_noise_depends_on_the_seed_of_the_optimizer_alone():
    """Processes with other seeds of torch compute the same step, so B remains the same in all of them."""
    found = {}
    for torch_seed, probe_seed in ((1, 0), (2, 0), (1, 5)):
        model = converted()
        torch.manual_seed(torch_seed)
        optimizer = sgd(model)
        optimizer.probe_seed = probe_seed
        train(model, optimizer, range(3))
        found[torch_seed, probe_seed] = feedback_of(model)
    torch.testing.assert_close(found[1, 0], found[2, 0], rtol=0, atol=0)
    assert not torch.equal(found[1, 0][0], found[1, 5][0])


def test_steps_and_layers_have_noise_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)
    pyfeedback.convert(model, pyfeedback.rule("wm", source="probes", tau=1.0, probes=5))
    optimizer = pyfeedback.optim.FeedbackSGD(model, lr=1.0)
    optimizer.step()
    first, other = feedback_of(model)
    assert not torch.allclose(first, other)
    optimizer.step()
    assert not torch.allclose(first, model[0].feedback)


@pytest.mark.parametrize("every", [2, 3])
def test_an_estimate_of_every_few_steps_counts_as_much(every):
    model = converted(every=every, tau=9.0)
    optimizer = pyfeedback.optim.FeedbackSGD(model, lr=1.0)
    previous, moved = feedback_of(model), []
    for _ in range(7):
        optimizer.step()
        moved.append(not torch.equal(previous[0], model[0].feedback))
        previous = feedback_of(model)
    assert moved == [step % every == 0 for step in range(7)]
    once = converted(every=1, tau=9.0 / every)
    pyfeedback.optim.FeedbackSGD(once, lr=1.0).step()
    twice = converted(every=every, tau=9.0)
    pyfeedback.optim.FeedbackSGD(twice, lr=1.0).step()
    torch.testing.assert_close(feedback_of(once), feedback_of(twice))


def test_estimates_become_rarer_as_tau_grows():
    model = converted(name="wm", every=0, tau=5.0, growth=0.02, probes=0, orthogonal=True)
    optimizer = pyfeedback.optim.FeedbackSGD(model, lr=1.0)
    assert [model[0].rule.every_at(step) for step in (0, 1999, 2000, 3000, 10**5)] == [1, 1, 2, 3, 100]
    optimizer.param_groups[0]["feedback_step"] = 3999  # tau is 80 from step 4000 on: one of four steps
    previous, moved = feedback_of(model), []
    for _ in range(8):
        optimizer.step()
        moved.append([not torch.equal(*pair) for pair in zip(previous, feedback_of(model), strict=True)])
        previous = feedback_of(model)
    assert moved == 2 * [[True, True], *3 * [[False, False]]]
    assert optimizer.probe_counts()["0"].sweep == 5  # a sweep of 27 inputs in 5 * 4 of 80 steps


def test_the_frequency_of_estimates_needs_a_time_constant():
    with pytest.raises(ValueError, match="every is 0, expected 1 or more"):
        pyfeedback.rule("wm", source="probes", every=0)


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("build", [sgd, lambda model: pyfeedback.optim.AdamW(model, lr=1e-3)], ids=["SGD", "AdamW"])
def test_a_resumed_run_is_the_same(build, orthogonal):
    options = {"orthogonal": orthogonal, "probes": 0.4}
    model = converted(**options)
    optimizer = build(model)
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    resumed = converted(**options)
    again = build(resumed)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(resumed, again, range(3, 6))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_rule_with_units_follows_the_learning_rate():
    """The estimate is the gradient of SGD, with momentum."""
    model = converted(name="wm", tau=0.0, amp=0.5, decay=0.1, probes=3)
    layer = model[0]
    optimizer = pyfeedback.optim.FeedbackSGD(model, lr=0.3, momentum=0.9)
    b, buffer = layer.feedback.detach().clone(), torch.zeros_like(layer.feedback)
    for step in range(3):
        optimizer.step()
        noise = random_signs(3, 27, b, generator(step * 1_000_003))
        gradient = probe_gradient(layer.as_matrices(layer.weight.detach()), layer.as_matrices(b), noise,
                                  Coefficients(amp=0.5, decay=0.1))  # fmt: skip
        buffer = 0.9 * buffer + layer.from_matrices(gradient)
        b = b - 0.3 * buffer
    torch.testing.assert_close(layer.feedback.detach(), b)


def test_the_loss_scale_and_clipping_do_not_matter():
    found = []
    for scale in (None, 1024.0):
        model = converted()
        optimizer = pyfeedback.optim.FeedbackSGD(model, lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        scaler.scale(model(batch(0)).square().mean()).backward()
        scaler.step(optimizer)
        found.append(feedback_of(model))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_rule_that_no_optimizer_steps_is_reported_once(caplog):
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, range(3))
    assert [r.levelname for r in caplog.records if "does not learn" in r.message] == ["WARNING"]
    caplog.clear()
    model = converted()
    train(model, sgd(model), range(3))
    assert not caplog.records


def test_a_compiled_model():
    model = converted()
    optimizer = sgd(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    other = converted()
    train(other, sgd(other), range(3))
    train(compiled, optimizer, range(3))
    torch.testing.assert_close(feedback_of(other), feedback_of(model))
