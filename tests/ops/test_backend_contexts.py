"""A selected backend applies to the `with` block of a thread, and to the backward passes of its forward passes."""

import _thread
import contextvars
import threading

import pytest
import torch
from small_networks import perceptron

import pyfeedback
from pyfeedback.backends import dispatch
from pyfeedback.backends.extension import dense
from pyfeedback.core.geometry import LINEAR, to_arguments
from pyfeedback.nn import Conv1d, Conv2d, Linear

RULE = {"amp": 0.3, "decay": 0.1, "center": True}
RULES = {"dense": pyfeedback.Rule(**RULE)}


@pytest.fixture
def used(monkeypatch):
    """The backend of each centering kernel that runs: "composite", or "auto", which chooses the compiled one."""
    if not pyfeedback.build_info().cpu:
        pytest.skip("the CPU library is not built")
    names = []
    kernels = dispatch._IMPLEMENTATIONS["center"]
    for name, backend in (("composite", "composite"), ("extension", "auto")):

        def center(input, samples, backend=backend, real=kernels[name]):
            names.append(backend)
            return real(input, samples)

        monkeypatch.setitem(kernels, name, center)
    for name in ("MOST_MACS", "MOST_MACS_LINEAR"):  # the kernel of a small layer centers itself
        monkeypatch.setattr(dense, name, 0)
    pyfeedback.set_backend("auto")  # forgets what was chosen before
    yield names
    monkeypatch.undo()
    pyfeedback.set_backend("auto")


def in_thread(function, *arguments, start=threading.Thread):
    """Run the function in a new thread; its exceptions are raised here."""
    found = []

    def body():
        try:
            found.append((function(*arguments), None))
        except BaseException as error:
            found.append((None, error))

    if start is threading.Thread:
        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
    else:
        done = threading.Event()
        start(lambda: (body(), done.set()), ())
        done.wait(60)
    ((result, error),) = found
    if error is not None:
        raise error
    return result


def test_overlapping_blocks_of_two_threads_leave_no_state():
    first_open, second_open, first_closed = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        with pyfeedback.backend("composite"):
            first_open.set()
            second_open.wait(60)
            seen["first"] = pyfeedback.current_backend()
        first_closed.set()

    def second():
        first_open.wait(60)
        seen["before"] = pyfeedback.current_backend()
        with pyfeedback.backend("extension" if pyfeedback.build_info().cpu else "composite"):
            second_open.set()
            first_closed.wait(60)
            seen["second"] = pyfeedback.current_backend()

    threads = [threading.Thread(target=f) for f in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    compiled = "extension" if pyfeedback.build_info().cpu else "composite"
    assert seen == {"first": "composite", "before": "auto", "second": compiled}
    assert pyfeedback.current_backend() == "auto"
    assert in_thread(pyfeedback.current_backend) == "auto"


def test_set_backend_is_the_default_of_every_thread_and_a_block_overrides_it():
    with pyfeedback.backend("auto"):
        pyfeedback.set_backend("composite")
        try:
            assert pyfeedback.current_backend() == "auto"
            assert in_thread(pyfeedback.current_backend) == "composite"
            assert contextvars.Context().run(pyfeedback.current_backend) == "composite"
        finally:
            pyfeedback.set_backend("auto")
    assert pyfeedback.current_backend() == "auto"


def test_blocks_nest_and_close_when_something_is_raised():
    def fails():
        with pyfeedback.backend("auto"):
            raise KeyError(pyfeedback.current_backend())

    with pyfeedback.backend("composite"):
        with pytest.raises(KeyError, match="auto"):
            fails()
        assert pyfeedback.current_backend() == "composite"
    with pytest.raises(ValueError, match="backend is 'cudnn'"), pyfeedback.backend("cudnn"):
        pass
    assert pyfeedback.current_backend() == "auto"
    assert dispatch.open_blocks == []


def test_a_thread_that_python_did_not_start_uses_the_open_block():
    """Such as the threads of autograd, which run a compiled backward pass on a GPU."""
    assert in_thread(pyfeedback.current_backend, start=_thread.start_new_thread) == "auto"
    with pyfeedback.backend("composite"):
        assert in_thread(pyfeedback.current_backend, start=_thread.start_new_thread) == "composite"
        assert in_thread(pyfeedback.current_backend) == "auto"
        with pyfeedback.backend("auto"):
            assert in_thread(pyfeedback.current_backend, start=_thread.start_new_thread) == "auto"


def layer(kind):
    torch.manual_seed(0)
    make, shape = {
        "conv2d": (lambda: Conv2d(4, 4, 3, bias=False, rule=RULES["dense"]), (2, 4, 6, 6)),
        "conv1d": (lambda: Conv1d(4, 4, 3, rule=RULES["dense"]), (2, 4, 6)),
        "linear": (lambda: Linear(4, 4, rule=RULES["dense"]), (2, 3, 4)),
    }[kind]
    return make(), torch.randn(shape)


def by_layer(kind):
    module, x = layer(kind)
    return module(x)


def by_op(kind):
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((2, 3, 4), (4, 4), (4, 4)))
    if kind == "linear":
        return torch.ops.pyfeedback.fa_linear(x, w, b, **RULE)
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((2, 4, 6, 6), (4, 4, 3, 3), (4, 4, 3, 3)))
    return torch.ops.pyfeedback.fa_conv2d(x, w, b, **RULE)


def by_scheduled_op(kind):
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((2, 3, 4), (4, 4), (4, 4)))
    coefficients = torch.tensor([0.1, 0.3, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    op, options = torch.ops.pyfeedback.scheduled_layer, {"center": True, "samples": 0, "positions": 1}
    return op(x, w, b, None, coefficients, *to_arguments(LINEAR), **options)


FORWARDS = {
    "layer-conv2d": (by_layer, "conv2d"),
    "layer-conv1d": (by_layer, "conv1d"),
    "layer-linear": (by_layer, "linear"),
    "op-conv2d": (by_op, "conv2d"),
    "op-linear": (by_op, "linear"),
    "scheduled": (by_scheduled_op, "linear"),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_backward_pass_uses_the_backend_of_its_forward(name, used):
    forward, kind = FORWARDS[name]
    with pyfeedback.backend("composite"):
        inside = forward(kind)
    outside = forward(kind)
    used.clear()
    inside.sum().backward()
    assert set(used) == {"composite"}
    used.clear()
    with pyfeedback.backend("composite"):
        outside.sum().backward()
    assert set(used) == {"auto"}
    with pyfeedback.backend("composite"):
        inside = forward(kind)
    used.clear()
    in_thread(inside.sum().backward)
    assert set(used) == {"composite"}
    assert pyfeedback.current_backend() == "auto"


@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_under_torch_func(kind, used):
    module, x = layer(kind)
    parameters = dict(module.named_parameters())

    def forward(parameters):
        return torch.func.functional_call(module, parameters, (x,))

    with pyfeedback.backend("composite"):
        _, pull = torch.func.vjp(forward, parameters)
    used.clear()
    pull(module(x).detach())
    assert set(used) == {"composite"}
    _, pull = torch.func.vjp(forward, parameters)
    used.clear()
    with pyfeedback.backend("composite"):
        pull(module(x).detach())
    assert set(used) == {"auto"}


def test_a_model_over_two_threads_with_a_backend_each(used):
    """Interleaved forward and backward passes of two threads."""
    turns = threading.Barrier(2, timeout=60)
    model = pyfeedback.convert(perceptron(4, 4, 4), RULES["dense"])
    seen = {}

    def train(name):
        with pyfeedback.backend(name):
            turns.wait()
            loss = model(torch.randn(3, 4)).square().sum()
            turns.wait()
            assert pyfeedback.current_backend() == name
        turns.wait()
        torch.autograd.grad(loss, list(model.parameters()))
        seen[name] = pyfeedback.current_backend()

    threads = [threading.Thread(target=train, args=(name,)) for name in ("composite", "auto")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"composite": "auto", "auto": "auto"}
    assert set(used) == {"composite", "auto"}
