"""The training program: recipes, networks and measurements."""

import pytest
import torch
from torch import nn
from training_program import few_digits, new_run, nothing, part, settings

import pyfeedback

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("example_folder")


# Recipes


def test_the_learning_rate_is_the_papers():
    rate = part("recipe").rate
    paper = part("settings").Settings()
    expected = {0: 0, 2.5: 0.5, 5: 1, 29.9: 1, 30: 0.1, 60: 0.01, 79.9: 0.01, 80: 0.001, 90: 0.001}
    assert {epoch: rate(paper, epoch) for epoch in expected} == pytest.approx(expected)


def test_a_cosine_goes_from_the_warm_up_to_the_end():
    cosine = part("settings").Settings(cosine=True, epochs=12, warmup=2)
    found = [part("recipe").rate(cosine, epoch) for epoch in (1, 2, 7, 12)]
    assert found == pytest.approx([0.5, 1, 0.5, 0], abs=1e-12)


def test_the_published_settings():
    found = {name: settings for name, (settings, _) in part("configurations").CONFIGURATIONS.items()}
    paper = found["imagenet-kp"]
    assert (paper.epochs, paper.batch, paper.warmup, paper.milestones) == (90, 256, 5, (30, 60, 80))
    assert (paper.momentum, paper.nesterov, paper.weight_decay) == (0.9, True, 1e-4)
    assert paper.rule.decay == paper.weight_decay  # otherwise W and B do not converge
    he = found["cifar10"]
    steps = 50_000 // he.batch
    assert [round(epoch * steps, -3) for epoch in (*he.milestones, he.epochs)] == [32_000, 48_000, 64_000]
    biotorch = found["biotorch-cifar10-usf"]
    assert (biotorch.epochs, biotorch.batch, biotorch.lr, biotorch.milestones) == (250, 128, 0.1, (100, 150, 200))
    assert not biotorch.nesterov
    assert found["biotorch-cifar10-dfa"].lr == found["biotorch-imagenet-dfa"].lr == 0.001


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rule": pyfeedback.rule("bp")}, ["SGD"]),
        ({"feedback_lr": None}, ["SGD"]),
        ({"feedback_lr": 0.1}, ["SGD", "FeedbackSGD"]),
        ({"optimizer": "adam", "feedback_lr": None}, ["Adam"]),
        ({"optimizer": "adamw", "feedback_lr": None}, ["AdamW"]),
        ({"optimizer": "adam", "feedback_lr": 0.1}, ["Adam", "FeedbackSGD"]),
    ],
    ids=["bp", "together", "apart", "adam", "adamw", "adam apart"],
)
@pytest.mark.parametrize("rule", ["ia", "sa"])
def test_every_parameter_has_one_optimizer(rule, changes, expected):
    run = new_run(settings(**{"rule": pyfeedback.rule(rule), **changes}))
    assert [type(optimizer).__name__ for optimizer in run.optimizers] == expected
    stepped = [id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(stepped) == sorted(id(p) for p in run.network.parameters())
    before = [p.clone() for p in run.network.parameters()]
    run.train(nothing, nothing)
    assert not any(torch.equal(a, b) for a, b in zip(before, run.network.parameters(), strict=True))


def test_feedback_is_drawn_to_scale():
    one, tenth = (new_run(settings("digits-fa", feedback_scale=scale)) for scale in (1.0, 0.1))
    for a, b in zip(one.monitor.latest.values(), tenth.monitor.latest.values(), strict=True):
        assert b.norm_ratio == pytest.approx(0.1 * a.norm_ratio)


@pytest.mark.slow
def test_noise_reduces_the_alignment():
    angles = {}
    for noise in (0.0, 1.0):
        run = new_run(settings("digits-sa", noise=noise, epochs=4), few_digits(1024))
        run.train(nothing, nothing)
        angles[noise] = run.rows[-1]["angle"]
    assert angles[1.0] > angles[0.0] + 10


def test_kolen_pollack_aligns():
    run = new_run(settings("digits-kp", epochs=4), few_digits(1024))
    run.train(nothing, nothing)
    first, *_, last = run.monitor.readings.values()
    for layer in first:
        assert last[layer].angle < first[layer].angle - 5


# Networks


def test_the_residual_networks_of_cifar_have_the_published_sizes():
    """He et al. 2016, table 6: 0.27, 0.46 and 0.85 million parameters."""
    for depth, millions in ((20, 0.27), (32, 0.46), (56, 0.85)):
        network = part("models").build(f"resnet{depth}", 10, torch.Size([3, 32, 32]))
        layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert len(layers) == depth
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_every_layer_but_the_first_gets_feedback():
    network = part("models").convert(part("models").cifar_resnet(8, 10), pyfeedback.rule("fa"))
    names = [name for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [name for name, _ in pyfeedback.feedback_layers(network)] == names[1:]


def test_frozen_features_train_only_the_classifier():
    run = new_run(settings(epochs=3), few_digits(1024, 512))
    before = {name: p.clone() for name, p in run.frozen.named_parameters()}
    run.train(nothing, nothing)
    changed = [name for name, p in run.frozen.named_parameters() if not torch.equal(p, before[name])]
    *_, last = (name for name, m in run.frozen.named_modules() if isinstance(m, nn.Linear))
    assert changed == [f"{last}.weight", f"{last}.bias"]
    assert run.rows[-1]["frozen_accuracy"] == run.evaluate(run.frozen)[1]
    assert 30 < run.rows[-1]["frozen_accuracy"] < run.rows[-1]["test_accuracy"]


@pytest.mark.parametrize("name", ["resnet21", "demo"])
def test_a_network_that_does_not_fit_is_named(name):
    with pytest.raises(ValueError, match=f"model is '{name}', (expected|which needs torchvision)"):
        part("models").build(name, 10, torch.Size([3, 32, 32]))


# Measurements


def test_evaluation_counts_every_test_image():
    run = new_run(settings(batch=48))  # the last batch is smaller
    images = torch.stack([image for image, _ in few_digits().test])
    labels = torch.tensor([label for _, label in few_digits().test])
    scores = run.network.eval()(images)
    loss, accuracy = run.evaluate(run.network)
    assert loss == pytest.approx(nn.functional.cross_entropy(scores, labels).item(), rel=1e-6)
    assert accuracy == 100 * (scores.argmax(1) == labels).double().mean().item()


def test_the_moving_average_has_exponential_weights():
    place = part("device").Place(torch.device("cpu"))
    average = part("loop").MovingAverage(0.9, place.device)
    values = torch.randn(5, 2, dtype=torch.float64)
    for pair in values:
        average.update(pair)
    weights = 0.9 ** torch.arange(4, -1, -1, dtype=torch.float64)
    assert average.read() == average.read(place) == pytest.approx(((weights @ values) / weights.sum()).tolist())


def test_scale_growth_is_that_of_the_weights():
    run = new_run(settings())
    start = [p.detach().norm() for p in pyfeedback.forward_parameters(run.network) if p.dim() > 1]
    run.train(nothing, nothing)
    now = [p.detach().norm() for p in pyfeedback.forward_parameters(run.network) if p.dim() > 1]
    growth = sum((b / a).item() for a, b in zip(start, now, strict=True)) / len(now)
    assert run.rows[-1]["growth"] == pytest.approx(growth)


def test_a_run_that_diverges_stops():
    run = new_run(settings("digits-bp", lr=1e30, epochs=5))
    run.train(nothing, nothing)
    assert run.diverged
    assert len(run.rows) < 5
