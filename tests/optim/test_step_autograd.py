"""Steps and autograd: version counters of written tensors, and grad mode."""

import pytest
import torch
from small_networks import perceptron
from torch import nn

import pyfeedback
from pyfeedback import functional
from pyfeedback.backends.dispatch import current_implementation
from pyfeedback.backends.extension import loading
from pyfeedback.optim import SGD, AdamW, FeedbackSGD

PATHS = [
    pytest.param("extension", marks=pytest.mark.skipif(not loading.has_cpu(), reason="the CPU library is not built")),
    "composite",
]
NUMBERS = {"decay": [0.1], "self_": [0.2], "tie": [0.3], "lr": 0.1, "momentum": 0.9}
CALLS = {"function": functional.feedback_step_, "op": torch.ops.pyfeedback.feedback_step_}


@pytest.fixture(params=PATHS, autouse=True)
def path(request):
    with pyfeedback.backend(request.param):
        yield request.param


def operands():
    return [[torch.randn(3, 4)] for _ in range(4)]


def versions(tensors):
    return [t._version for t in tensors]


@pytest.mark.parametrize("call", CALLS)
def test_a_step_bumps_only_the_versions_of_what_it_writes(call):
    (b,), (w,), (g,), (m,) = lists = operands()
    before = versions((b, w, g, m))
    CALLS[call](*lists, **NUMBERS)
    moved = [after > version for after, version in zip(versions((b, w, g, m)), before, strict=True)]
    assert moved == [True, False, False, True]


@pytest.mark.parametrize("call", CALLS)
def test_without_momentum_the_version_of_the_buffer_is_unchanged(call):
    (b,), _, _, (m,) = lists = operands()
    before = versions((b, m))
    CALLS[call](*lists, **{**NUMBERS, "momentum": 0.0})
    assert b._version > before[0]
    assert m._version == before[1]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_an_adamw_step_bumps_only_the_versions_of_what_it_writes(amsgrad, strided):
    """The fused kernel of torch, which the composed step calls, does not bump them."""
    tensors = [torch.rand(3, 4) for _ in range(6 if amsgrad else 5)]
    if strided:
        tensors[2] = tensors[2].t().contiguous().t()
    step = torch.tensor(0.0)
    before = versions([*tensors, step])
    numbers = {"decay": [0.1], "self_": [0.2], "tie": [0.3], "weight_decay": [0.1]}
    current_implementation("adamw_step_", "cpu")(
        *([t] for t in tensors), step=[step], **numbers, lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8
    )
    moved = [after > version for after, version in zip(versions([*tensors, step]), before, strict=True)]
    assert moved == [True, False, False, *[True] * (len(tensors) - 2)]


def test_a_refused_step_bumps_no_version():
    (b,), _, (g,), (m,) = lists = operands()
    before = versions((b, g, m))
    with pytest.raises(ValueError, match=r"weight\[0\] is"):
        functional.feedback_step_(lists[0], [torch.ones(2)], *lists[2:], **NUMBERS)
    assert versions((b, g, m)) == before


def network(rule):
    return pyfeedback.convert(perceptron(4, 5, 3), rule)


@pytest.mark.parametrize("make", [SGD, AdamW, FeedbackSGD])
@pytest.mark.parametrize("rule", ["kp", "sa", "ia"])
def test_a_graph_built_before_a_step_raises_as_under_torch_optim(rule, make):
    """Its gradient would mix old and new weights."""
    model = network(rule)
    optimizer = make(model, lr=0.1)
    x = torch.randn(6, 4, requires_grad=True)
    first = model(x).square().sum()
    model(x).square().sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


def test_a_graph_built_after_a_step_is_valid():
    model = network("kp")
    optimizer = SGD(model, lr=0.1)
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        model.zero_grad()
        model(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


# Grad mode


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("which", "name"), [(0, "feedback"), (3, "momentum_buffer")])
@pytest.mark.parametrize("kind", ["leaf", "tensor"])
def test_a_write_to_what_requires_grad_is_refused_where_grad_mode_is_on(call, which, name, kind):
    lists = operands()
    tensor = nn.Parameter(lists[which][0])
    lists[which] = [tensor if kind == "leaf" else tensor * 1]
    before = [ts[0].detach().clone() for ts in lists]
    with pytest.raises(RuntimeError) as refused:
        CALLS[call](*lists, **NUMBERS)
    assert str(refused.value) == f"{name}[0] is a {kind} that requires grad, expected a step in torch.no_grad()"
    assert all(torch.equal(ts[0], b) for ts, b in zip(lists, before, strict=True))
    with torch.no_grad():
        CALLS[call](*lists, **NUMBERS)
    assert not torch.equal(lists[which][0], before[which])


@pytest.mark.parametrize("call", CALLS)
def test_weight_and_gradient_are_constants(call):
    lists = operands()
    lists[1], lists[2] = ([nn.Parameter(ts[0])] for ts in lists[1:3])
    CALLS[call](*lists, **NUMBERS)
    assert not lists[0][0].requires_grad
    assert not lists[3][0].requires_grad


def test_a_buffer_that_is_not_written_may_require_grad():
    lists = operands()
    lists[3] = [nn.Parameter(lists[3][0])]
    feedback, buffer = lists[0][0].clone(), lists[3][0].detach().clone()
    functional.feedback_step_(*lists, **{**NUMBERS, "momentum": 0.0})
    assert torch.equal(lists[3][0], buffer)
    assert not torch.equal(lists[0][0], feedback)


def test_a_compiled_step_is_refused_too():
    feedback = nn.Parameter(torch.ones(3))

    def step():
        functional.feedback_step_([feedback], [], [], decay=[0.1], self_=[0.0], tie=[0.0], lr=0.1)

    with pytest.raises(RuntimeError, match=r"feedback\[0\] is a leaf that requires grad"):
        torch.compile(step, backend="eager")()
    assert torch.equal(feedback, torch.ones(3))


def test_inference_tensors_are_refused_before_anything_is_written():
    """The composed step refuses them, as torch does. The compiled step may write them: no graph can have saved them."""
    lists = operands()
    with torch.inference_mode():
        lists[0] = [torch.ones(3, 4)]
    before = lists[3][0].clone()
    with (
        pyfeedback.backend("composite"),
        pytest.raises(RuntimeError, match=r"feedback\[0\] is an inference tensor, expected a step in torch.inference"),
    ):
        functional.feedback_step_(*lists, **NUMBERS)
    assert torch.equal(lists[3][0], before)
    with torch.inference_mode():
        functional.feedback_step_(*lists, **NUMBERS)
    assert not torch.equal(lists[0][0], torch.ones(3, 4))
