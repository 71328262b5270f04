"""The initialization of feedback weights."""

import pytest
import torch
from torch import nn

import pyfeedback
from pyfeedback import Init


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 16))


def drawn(init, model=None):
    return [
        p.detach().clone()
        for p in pyfeedback.feedback_parameters(pyfeedback.convert(model or network(), "ia", init=init))
    ]


def test_any_function_of_torch_nn_init():
    assert all((a == 1).all() for a in drawn(nn.init.ones_))
    for a in drawn(nn.init.orthogonal_):
        rows = a.flatten(1)
        product = rows @ rows.t() if rows.shape[0] <= rows.shape[1] else rows.t() @ rows
        torch.testing.assert_close(product, torch.eye(product.shape[0]), atol=1e-5, rtol=0)
    for a in drawn(lambda t: nn.init.uniform_(t, 2.0, 3.0)):
        assert 2 <= a.min() < a.max() <= 3


def test_scale():
    seeded = Init(seed=1)
    for a, b in zip(drawn(Init(seed=1, scale=0.5)), drawn(seeded), strict=True):
        torch.testing.assert_close(a, 0.5 * b)


def test_sparse_feedback_keeps_a_fraction():
    for a in drawn(Init(density=0.25)):
        assert (a != 0).double().mean() == pytest.approx(0.25, abs=0.06)


def test_sign_concordant_feedback():
    model = network()
    drawn(Init(signs="weight"), model)
    for _, layer in pyfeedback.feedback_layers(model):
        assert torch.equal(layer.feedback.sign(), layer.weight.sign())
        assert not torch.equal(layer.feedback, layer.weight)


def test_a_seed_draws_the_same_everywhere_and_leaves_the_generator_alone():
    torch.manual_seed(11)
    first = drawn(Init(seed=5), model := network())
    torch.manual_seed(12)
    state = torch.get_rng_state()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        again = drawn(Init(seed=5), network().to(dtype))
        for a, b in zip(again, first, strict=True):
            torch.testing.assert_close(a, b.to(dtype), rtol=2e-2 if dtype is torch.bfloat16 else 1e-6, atol=0)
    torch.manual_seed(12)
    layer = pyfeedback.nn.Linear(4, 4, init=Init(seed=5))
    fed = layer.feedback.detach().clone()
    layer.reset_feedback()
    assert torch.equal(layer.feedback, fed)
    assert torch.equal(state, torch.manual_seed(12).get_state())
    assert not torch.equal(first[0].flatten()[:16], first[1].flatten()[:16])  # each layer has its own stream
    assert model[0].feedback_init.seed != model[2].feedback_init.seed


@pytest.mark.parametrize("name", ["normal_", "orthogonal_"])
def test_a_seeded_draw_is_independent_of_dtype_memory_format_and_order(name):
    init = Init(seed=5, init_fn=getattr(nn.init, name))
    expected = dict(pyfeedback.feedback_layers(pyfeedback.convert(network(), "fa", init=init)))
    model = network().double().to(memory_format=torch.channels_last)
    model[0] = nn.Identity()
    found = dict(pyfeedback.feedback_layers(pyfeedback.convert(model, "fa", init=init)))
    assert list(found) == ["2", "4"]
    for layer, feedback in found.items():
        assert torch.equal(feedback.feedback, expected[layer].feedback.double())


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_init_functions_without_16_bit_support_work_in_every_dtype(dtype, seed):
    layer = pyfeedback.convert(nn.Linear(8, 8, dtype=dtype), "fa", init=Init(init_fn=nn.init.orthogonal_, seed=seed))
    assert layer.feedback.dtype is dtype
    product = (layer.feedback @ layer.feedback.t()).double()
    torch.testing.assert_close(product, torch.eye(8).double(), atol=0.02, rtol=0)


def test_layers_accept_init():
    layer = pyfeedback.nn.Conv2d(3, 4, 3, init=nn.init.zeros_)
    assert not layer.feedback.any()
    layer = pyfeedback.nn.Linear(300, 100, init=Init(scale=3.0))
    assert layer.feedback.detach().std() == pytest.approx(3 * float(layer.weight.detach().std()), rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_fn": 3}, "init_fn is 3, expected a function"),
        ({"scale": float("nan")}, "scale is nan, expected a finite number"),
        ({"density": 0.0}, "density is 0.0, expected a number above 0 and at most 1"),
        ({"signs": "all"}, "signs is 'all', expected one of free, weight"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Init(**options)


def test_law_is_the_old_name_of_init_fn():
    layer = pyfeedback.nn.Linear(3, 4)
    init = Init(init_fn=nn.init.zeros_)
    for call, expected in (
        (lambda: Init(law=nn.init.zeros_), init),
        (lambda: init.law, nn.init.zeros_),
        (lambda: layer.reset_feedback(law=nn.init.ones_), None),
    ):
        with pytest.warns(DeprecationWarning, match="^law is now init_fn; the old name") as warned:
            assert call() == expected
        assert warned[0].filename == __file__
    assert torch.equal(layer.feedback, torch.ones(4, 3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'law'"):
        Init(law=nn.init.zeros_, init_fn=nn.init.ones_)


def test_a_drawing_leaves_the_state_of_the_generator():
    feedback = torch.empty(3, 4)
    before = torch.get_rng_state()
    pyfeedback.Init(seed=7).draw(feedback, feedback, torch.nn.init.normal_)
    assert torch.equal(torch.get_rng_state(), before)
