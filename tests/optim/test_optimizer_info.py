"""PyTorch's own test settings of SGD and AdamW, for the whole-model optimizers: the same results, or an error.

They come from `torch.testing._internal.common_optimizers.optim_db`.
"""

import copy
import inspect

import pytest
import torch
from cases import largest_error
from torch import nn
from torch_suites import optim_db

import pyfeedback
from pyfeedback import optim
from pyfeedback.backends.extension import loading

INFO = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls in (torch.optim.SGD, torch.optim.AdamW)}
OURS = {"SGD": optim.SGD, "AdamW": optim.AdamW}
NOT_OURS = {
    "foreach",
    "fused",
    "differentiable",
    "capturable",
    "maximize",
    "dampening",
}  # only torch's
BACKENDS = [
    "auto",
    "composite",
    pytest.param("extension", marks=pytest.mark.skipif(not loading.has_cpu(), reason="the CPU library is not built")),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 3, 4, 5), (40_000,)]
STEPS = 4


def settings(name, accepted, dtype=torch.float32):
    """The keyword arguments of each sample, supported or unsupported by our constructor."""
    kwargs = [sample.kwargs for sample in INFO[name].optim_inputs_func("cpu", dtype)]
    return [k for k in kwargs if accepted == NOT_OURS.isdisjoint(k)]


ACCEPTED = [(name, kwargs) for name in OURS for kwargs in settings(name, True)]
REFUSED = [(name, kwargs) for name in OURS for kwargs in settings(name, False)]


def model(dtype):
    """Parameters of various shapes, a strided one and one without gradient, and one feedback layer."""
    torch.manual_seed(0)
    parameters = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES]
    parameters += [parameters[-2].to(memory_format=torch.channels_last), torch.randn(9, 4).to(dtype)[:, ::2]]
    module = nn.ParameterList([nn.Parameter(p) for p in (*parameters, torch.zeros(3, dtype=dtype))])
    module.layer = pyfeedback.nn.Linear(2, 2, rule="fa", dtype=dtype)
    return module


def plain(module):
    return list(pyfeedback.forward_parameters(module))


def give_gradients(parameters, step):
    """Give every model the same gradients; the last parameter gets none."""
    torch.manual_seed(1 + step)
    for p in parameters:
        grad = torch.randn(p.shape, dtype=torch.float64).to(p.dtype)
        p.grad = None if p.shape == (3,) else torch.empty_like(p).copy_(grad)


def steps(optimizer, parameters, first=0, last=STEPS):
    for step in range(first, last):
        give_gradients(parameters, step)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def ours(name, kwargs, dtype):
    module = model(dtype)
    return OURS[name](module, **kwargs), plain(module)


def torchs(name, kwargs, dtype, working=None):
    """The steps of torch in the dtype ``working``, from the values in ``dtype``."""
    parameters = [nn.Parameter(p.detach().to(working or dtype)) for p in plain(model(dtype))]
    return INFO[name].optim_cls(parameters, **kwargs), parameters


def rounded_gradients(optimizer, parameters, dtype):
    """Steps in float64 with gradients rounded to ``dtype``."""
    for step in range(STEPS):
        give_gradients(parameters, step)
        for p in parameters:
            p.grad = None if p.grad is None else p.grad.to(dtype).to(p.dtype)
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "kwargs"), ACCEPTED, ids=str)
def test_steps_are_torchs(name, kwargs, backend, dtype):
    """The error is at most twice that of torch in every dtype, on average over the tensors; float64 agrees."""
    if dtype is torch.float16:
        kwargs = kwargs | ({"eps": 0.1} if name == "AdamW" else {})  # as in torch's list: 1e-8 is 0 in float16
    with pyfeedback.backend(backend):
        found = steps(*ours(name, copy.deepcopy(kwargs), dtype))
    expected = steps(*torchs(name, copy.deepcopy(kwargs), dtype))
    if dtype is torch.float64:
        assert largest_error(found, expected) < 1e-14
        return
    exact = rounded_gradients(*torchs(name, copy.deepcopy(kwargs), dtype, torch.float64), dtype)
    errors = [sum(largest_error([a], [b]) for a, b in zip(each, exact, strict=True)) for each in (found, expected)]
    assert errors[0] <= 2 * errors[1] + len(exact) * torch.finfo(dtype).eps


@pytest.mark.parametrize(("name", "kwargs"), REFUSED, ids=str)
def test_an_unsupported_setting_is_refused(name, kwargs):
    (refused, *_) = sorted(NOT_OURS & kwargs.keys())
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{refused}'"):
        ours(name, kwargs, torch.float32)


@pytest.mark.parametrize(
    ("name", "flag"),
    [(name, flag) for name in OURS for flag in inspect.signature(INFO[name].optim_cls).parameters if flag in NOT_OURS],
)
def test_flags_of_torchs_constructors_are_refused(name, flag):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{flag}'"):
        ours(name, {flag: True}, torch.float32)


def mistakes(name):
    """The settings that torch refuses, except those about its flags."""
    for error in INFO[name].optim_error_inputs_func("cpu", torch.float32):
        sample = error.optimizer_error_input
        if NOT_OURS.isdisjoint(sample.kwargs):
            yield pytest.param(name, sample, id=f"{name}: {sample.desc}")


@pytest.mark.parametrize(("name", "sample"), [case for name in OURS for case in mistakes(name)])
def test_what_torch_refuses_is_refused_in_one_line(name, sample):
    with pytest.raises((ValueError, TypeError, UserWarning)) as refused:
        OURS[name](model(torch.float32), params=sample.params, **sample.kwargs)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "kwargs"), ACCEPTED, ids=str)
def test_training_resumes_from_a_saved_state(name, kwargs, backend, tmp_path):
    with pyfeedback.backend(backend):
        optimizer, parameters = ours(name, kwargs, torch.float32)
        steps(optimizer, parameters, 0, 2)
        torch.save([optimizer.state_dict(), [p.detach() for p in parameters]], tmp_path / "saved.pt")
        state, values = torch.load(tmp_path / "saved.pt", weights_only=True)
        again, others = ours(name, {}, torch.float32)
        again.load_state_dict(state)
        for p, value in zip(others, values, strict=True):
            p.data.copy_(value)
        expected, found = steps(optimizer, parameters, 2), steps(again, others, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert str(again.state_dict()["param_groups"]) == str(optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize("name", OURS)
def test_a_copied_optimizer_is_independent(name):
    optimizer, parameters = ours(name, {"weight_decay": 0.1}, torch.float64)
    steps(optimizer, parameters, 0, 2)
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(state["state"])
    steps(optimizer, parameters, 2)
    for key, values in state["state"].items():
        for field, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[key][field]))


@pytest.mark.parametrize("name", OURS)
def test_schedulers_work_as_with_torchs(name):
    for makers in INFO[name].scheduler_inputs:
        results = []
        for make in (ours, torchs):
            optimizer, parameters = make(name, {"lr": 0.01}, torch.float64)
            schedulers = [maker(optimizer) for maker in makers]
            for step in range(6):
                steps(optimizer, parameters, step, step + 1)
                for scheduler in schedulers:
                    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                        scheduler.step(torch.tensor(1.0))
                    else:
                        scheduler.step()
            results.append([p.detach() for p in parameters])
        assert largest_error(*results) < 1e-14
