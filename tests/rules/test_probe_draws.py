"""Probes: the gradient of a rule that reads them, how they are drawn, and how many there are."""

import pytest
import torch

import pyfeedback
from pyfeedback import reference
from pyfeedback.backends import dispatch
from pyfeedback.backends.composite.probes import (
    orthogonal_probes,
    probe_gradient,
    random_signs,
    whole_basis_gradient,
)
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.hadamard import basis_size
from pyfeedback.core.probes import ProbeProblem, count_probes, part_of

RULES = {
    "wm": {"amp": 1.0, "decay": 1.0},
    "ia": {"amp": 2.0, "null": 1.0, "decay": 1.0},
    "aa": {"amp": 1.0, "sparse": 1.0},
    "all": {"amp": 0.7, "null": 0.3, "sparse": 0.5, "self_": 0.2, "decay": 0.1},
    "none but self": {"self_": 0.5, "decay": 1.0},
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# The gradient


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("terms", RULES)
@pytest.mark.parametrize(("count", "outputs", "inputs"), [(7, 5, 12), (40, 3, 9), (1, 6, 1)])
def test_gradient_is_that_of_the_reference(count, outputs, inputs, terms, normalize, groups):
    """The probes are the batch of a linear layer in each group; ``normalize`` divides null by the power of all."""
    rule = RULES[terms]
    weight, feedback = (
        torch.randn(groups, outputs, inputs, dtype=torch.float64, generator=generator(s)) for s in (1, 2)
    )
    noise = random_signs(count, inputs, weight, generator())
    null, scale = rule.get("null", 0.0), 1.0
    if normalize and null:
        spread = [noise @ w.t() @ b for w, b in zip(weight, feedback, strict=True)]
        scale = count * feedback.square().sum() / sum(z.square().sum() for z in spread)
    expected = []
    for w, b in zip(weight, feedback, strict=True):
        b = b.clone().requires_grad_()
        reference.linear(noise, w, b, **{**rule, "null": null * scale})[1].backward()
        expected.append(b.grad)
    found = probe_gradient(weight, feedback, noise, Coefficients(**rule, normalize=normalize))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_a_feedback_of_zero_has_no_null_term():
    weight = torch.randn(1, 4, 6, dtype=torch.float64, generator=generator())
    noise = random_signs(50, 6, weight, generator())
    found = probe_gradient(weight, torch.zeros_like(weight), noise, Coefficients(amp=2.0, null=1.0, normalize=True))
    torch.testing.assert_close(found, -2.0 * weight @ noise.t() @ noise / 50)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("terms", RULES)
def test_a_whole_basis_is_not_computed(terms, normalize):
    """Its second moment is the identity, so the gradient is that of all its probes without a product with them."""
    weight, feedback = (torch.randn(2, 5, 9, dtype=torch.float64, generator=generator(seed)) for seed in (1, 2))
    rule = Coefficients(**RULES[terms], normalize=normalize)
    expected = probe_gradient(weight, feedback, orthogonal_probes(9, 0, 16, weight, generator()), rule)
    torch.testing.assert_close(whole_basis_gradient(weight, feedback, rule), expected)
    problem = ProbeProblem(weight, feedback, 0, rule, 3, part_of(count_probes(16, 9, 0.1, 1, True, 0, True), 9, 4))
    torch.testing.assert_close(dispatch.probe_gradients([problem], 0, 4)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_random_signs(dtype):
    like = torch.empty(0, dtype=dtype)
    signs = random_signs(4001, 23, like, generator())
    assert signs.shape == (4001, 23)
    assert signs.dtype == (dtype if dtype.itemsize > 2 else torch.float32)
    assert signs.unique().tolist() == [-1, 1]
    moment = signs.t() @ signs / 4001  # entries off the diagonal have a standard deviation of 4001^-1/2
    torch.testing.assert_close(moment.diagonal(), torch.ones(23, dtype=signs.dtype))
    assert (moment - torch.eye(23)).abs().max() < 5 / 4001**0.5
    assert signs.mean(0).abs().max() < 5 / 4001**0.5
    torch.testing.assert_close(random_signs(4001, 23, like, generator()), signs, rtol=0, atol=0)
    assert not torch.equal(random_signs(4001, 23, like, generator(1)), signs)


@pytest.mark.parametrize(
    ("inputs", "size"),
    [(1, 1), (2, 2), (3, 4), (9, 16), (64, 64), (147, 256), (300, 384), (576, 640), (800, 896), (1000, 1024),
     (1025, 1152), (1300, 1408), (1900, 1920)],
)  # fmt: skip
def test_orthogonal_probes(inputs, size):
    assert basis_size(inputs) == size
    like = torch.empty(0, dtype=torch.float64)
    probes = orthogonal_probes(inputs, 0, size, like, generator())
    assert probes.abs().eq(1).all()
    assert torch.equal(probes.t() @ probes, size * torch.eye(inputs, dtype=torch.float64))
    parts = [orthogonal_probes(inputs, a, b, like, generator()) for a, b in ((0, size // 3), (size // 3, size))]
    torch.testing.assert_close(torch.cat(parts), probes, rtol=0, atol=0)
    if inputs > 3:
        assert not torch.allclose(orthogonal_probes(inputs, 0, size, like, generator(1)), probes)
    assert orthogonal_probes(inputs, 0, 1, like.bfloat16(), generator()).dtype == torch.float32


def test_orthogonal_probes_are_white():
    """Over many draws, one probe has mean 0, and its second moment is the identity."""
    like = torch.empty(0, dtype=torch.float64)
    drawn = torch.cat([orthogonal_probes(12, 2, 3, like, generator(seed)) for seed in range(3000)])
    assert drawn.mean(0).abs().max() < 5 / 3000**0.5
    assert (drawn.t() @ drawn / 3000 - torch.eye(12)).abs().max() < 5 * 2**0.5 / 3000**0.5


# The number of probes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((7, 100, 0.05, 1, True, 10), (7, 7, (100 * 0.05 / 14) ** 0.5)),  # given
        ((2.0, 100, 0.05, 1, True, 10), (200, 200, (0.05 / 4) ** 0.5)),  # given relative to the inputs
        ((0.001, 100, 0.05, 1, True, 10), (1, 1, 2.5**0.5)),
        ((0, 100, 0.05, 1, False, 10**6), (250, 250, 0.1)),  # for the noise floor
        ((0, 100, 0.05, 4, False, 10**6), (1000, 1000, 0.1)),  # an estimate counts four times as much
        ((0, 100, 0.05, 1, False, 0), (250, 250, 0.1)),  # a batch that is not known does not limit the cost
        ((0, 100, 0.05, 1, False, 1000), (30, 250, (5 / 60) ** 0.5)),  # 2 * 30 of 3 * 1000 is 2 %
        ((0, 100, 0.05, 1, True, 2000), (30, 250, (5 / 60) ** 0.5)),
        ((0, 100, 0.05, 4, True, 2000), (120, 1000, (20 / 240) ** 0.5)),
        ((0, 100, 0.05, 1, True, 10), (28, 250, (5 / 56) ** 0.5)),  # more noise than 0.3 radians is not accepted
        ((0, 100, 0.0, 1, True, 10), (1, 1, 0.0)),  # a rule with units has no time constant
    ],
)
def test_number_of_probes(arguments, expected):
    found = count_probes(*arguments)
    assert found[:2] == expected[:2]
    assert found.noise_floor == pytest.approx(expected[2])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((30, 256, 0.05, 1, True, 10), (29, 30, 9)),  # given; a basis of 256 in nine parts
        ((2.0, 250, 0.05, 1, True, 10), (256, 256, 1)),  # a whole basis has no noise, and more are never needed
        ((0, 256, 0.05, 1, False, 10**6), (52, 52, 5)),  # 0.1 radians: a sweep is 0.253 tau
        ((0, 256, 0.05, 2, False, 10**6), (128, 128, 2)),
        ((0, 256, 0.01, 1, False, 10**6), (11, 11, 24)),
        ((0, 256, 0.05, 1, True, 10), (18, 52, 15)),  # 0.3 radians
        ((0, 256, 0.05, 1, False, 1000), (29, 52, 9)),  # 2 * 30 of 3 * 1000 is 2 %
        ((30, 256, 0.5, 8, True, 10), (29, 30, 9)),  # B moves all the way in each estimate
        ((0, 256, 0.0, 1, True, 10), (1, 1, 256)),  # a rule with units has no time constant
    ],
)
def test_number_of_orthogonal_probes(arguments, expected):
    found = count_probes(*arguments, orthogonal=True)
    assert (found.probes, found.wanted, found.sweep) == expected
    if found.sweep == 1:
        assert found.noise_floor == 0
    if not arguments[0]:
        assert found.noise_floor <= 0.3
    if arguments[2] * arguments[3] > 1:
        assert found.noise_floor == pytest.approx(8**0.5)  # of nine directions, only one has been probed


@pytest.mark.parametrize(
    ("arguments", "orthogonal", "expected"),
    [
        ((0, 256, 0.05, 1, False, 10), True, (13, 13, 20, 1.0)),  # along every direction once in tau steps
        ((0, 256, 0.05, 4, False, 10), True, (52, 52, 5, 1.0)),
        ((0, 256, 0.05, 30, False, 10), True, (256, 256, 1, 1.0)),
        ((8, 256, 0.05, 1, False, 10), True, (8, 8, 32, 20 / 32)),  # too few: B needs 32 steps
        ((2.0, 256, 0.05, 1, False, 10), True, (256, 256, 1, 1.0)),
        ((0, 256, 0.0, 1, False, 10), True, (1, 1, 256, 1.0)),  # a rule with units has no time constant
        ((0, 100, 0.05, 1, False, 10), False, (5, 5, 0, 20 / 21)),
        ((300, 100, 0.05, 1, False, 10), False, (300, 300, 0, 1.0)),
        ((1, 99, 0.1, 1, False, 10), False, (1, 1, 0, 0.1)),
    ],
)
def test_number_of_probes_that_compare_responses(arguments, orthogonal, expected):
    found = count_probes(*arguments, orthogonal=orthogonal, has_sparse=True)
    assert (found.probes, found.wanted, found.sweep) == expected[:3]
    assert found.reach == pytest.approx(expected[3])
    assert found.noise_floor == 0


def test_an_estimate_is_not_captured_in_a_cuda_graph(monkeypatch):
    """Its seed and step are numbers of the program, which a replay would repeat."""
    model = pyfeedback.convert(torch.nn.Linear(6, 5), "wm-probes")
    optimizer = pyfeedback.optim.FeedbackSGD(model, lr=1.0)
    for name in ("is_available", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with pytest.raises(
        RuntimeError, match=r"^a CUDA graph is being captured, expected an optimizer step outside of it"
    ):
        optimizer.step()
