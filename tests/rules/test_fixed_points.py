"""The known fixed points of each rule with a fixed weight, reached by gradient steps."""

import pytest
import torch

import pyfeedback

OPTIONS = {"dtype": torch.float64}


def white(samples, channels):
    """Inputs whose second moment x'x / n is the identity up to rounding."""
    q, _ = torch.linalg.qr(torch.randn(samples, channels, **OPTIONS))
    return q * samples**0.5


def colored(samples, channels):
    return torch.randn(samples, channels, **OPTIONS) @ torch.randn(channels, channels, **OPTIONS) / 2


def second_moment(x):
    return x.t() @ x / len(x)


def settle(op, x, weight, steps, lr, **rule):
    """The feedback after gradient steps on the rule alone: the output gradient is zero."""
    feedback = torch.randn_like(weight).requires_grad_()
    for _ in range(steps):
        y = op(x, weight, feedback, **rule)
        (grad,) = torch.autograd.grad(y, feedback, torch.zeros_like(y))
        with torch.no_grad():
            feedback -= lr * grad
    return feedback.detach()


def settle_linear(x, weight, steps=250, lr=0.5, **rule):
    return settle(pyfeedback.functional.fa_linear, x, weight, steps, lr, **rule)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def weight():
    return torch.randn(4, 6, **OPTIONS)


def assert_near(actual, expected, tolerance=1e-8):
    assert (actual - expected).norm() <= tolerance * expected.norm()


def test_symmetric_alignment_reaches_the_weight(weight):
    assert_near(settle_linear(colored(32, 6), weight, self_=0.3, decay=0.3), weight)


def test_symmetric_alignment_reaches_a_multiple_of_the_weight(weight):
    assert_near(settle_linear(colored(32, 6), weight, self_=0.3, decay=0.2), 1.5 * weight)


def test_activation_alignment_reaches_the_weight(weight):
    assert_near(settle_linear(white(32, 6), weight, amp=0.5, sparse=0.5), weight)


def test_activation_alignment_reaches_the_weight_of_a_convolution():
    """Any input whose windows span the space of kernels is enough."""
    x, weight = torch.randn(8, 2, 7, 6, **OPTIONS), torch.randn(3, 2, 2, 3, **OPTIONS)
    rule = {"amp": 0.5, "sparse": 0.5, "padding": 1, "stride": (1, 2)}
    found = settle(pyfeedback.functional.fa_conv2d, x, weight, 400, 0.04, **rule)
    assert_near(found, weight)


@pytest.mark.parametrize("inputs", [white, colored])
@pytest.mark.parametrize("center", [False, True], ids=["uncentered", "centered"])
def test_weight_mirror_reaches_the_weight_seen_through_the_input(weight, inputs, center):
    x = inputs(32, 6) + (1.5 if center else 0)
    sigma = second_moment(x - x.mean(0) if center else x)
    found = settle_linear(x, weight, amp=0.3, decay=0.2, center=center)
    assert_near(found, 1.5 * weight @ sigma)


def test_weight_mirror_reaches_a_multiple_of_the_weight_on_white_inputs(weight):
    assert_near(settle_linear(white(32, 6), weight, amp=0.3, decay=0.2), 1.5 * weight)


def test_the_norm_of_weight_mirror_scales_with_the_input_variance(weight):
    x = white(32, 6)
    norms = [settle_linear(scale * x, weight, amp=0.3, decay=0.2).norm() for scale in (1, 3)]
    assert norms[1] / norms[0] == pytest.approx(9)


def ridge_decoder(x, weight, amp, null, decay):
    """The minimizer of R: (decay I + null W S W')^-1 amp W S."""
    sigma = second_moment(x)
    response = decay * torch.eye(len(weight), **OPTIONS) + null * weight @ sigma @ weight.t()
    return torch.linalg.solve(response, amp * weight @ sigma)


@pytest.mark.parametrize("inputs", [white, colored])
def test_information_alignment_reaches_the_ridge_decoder(weight, inputs):
    x, rule = inputs(32, 6), {"amp": 0.3, "null": 0.3, "decay": 0.3}
    assert_near(settle_linear(x, weight, steps=500, lr=0.1, **rule), ridge_decoder(x, weight, **rule))


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_information_alignment_stays_bounded_as_the_input_grows(weight, scale):
    """B tends to the pseudo-inverse of W at any input scale. Under weight mirror it grows as the scale squared."""
    x = scale * white(32, 6)
    found = settle_linear(x, weight, steps=600, lr=0.2 / scale**2, amp=0.3, null=0.3, decay=0.3)
    assert_near(found, ridge_decoder(x, weight, 0.3, 0.3, 0.3), 1e-4)
    assert found.norm() <= torch.linalg.pinv(weight).norm()


def test_oja_reaches_the_pseudo_inverse_on_white_inputs(weight):
    """With amp = null and no decay, W B' is the identity."""
    found = settle_linear(white(32, 6), weight, steps=1000, lr=0.1, amp=0.5, null=0.5)
    assert_near(weight @ found.t(), torch.eye(4, **OPTIONS))


@pytest.mark.parametrize(("ratio", "stable"), [(1.9, True), (2.1, False)], ids=["below", "above"])
def test_activation_alignment_is_stable_up_to_its_bound(weight, ratio, stable):
    """lr * sparse * lambda_max(Sigma) < 2: along the top eigenvector, a step multiplies the error by one minus this."""
    x, sparse, steps = colored(32, 6), 0.4, 100
    _, vectors = torch.linalg.eigh(second_moment(x))
    lr = ratio / (sparse * torch.linalg.eigvalsh(second_moment(x)).max())
    torch.manual_seed(1)
    start = torch.randn_like(weight) - weight
    torch.manual_seed(1)
    found = settle_linear(x, weight, steps=steps, lr=lr, amp=sparse, sparse=sparse)
    top = vectors[:, -1]
    growth = ((found - weight) @ top).norm() / (start @ top).norm()
    assert growth == pytest.approx(abs(1 - ratio) ** steps, rel=1e-3)
    assert ((found - weight).norm() < start.norm()) == stable
