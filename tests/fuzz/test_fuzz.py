"""The first cases of every kind of `make fuzz`, and its handling of cases that fail, crash or hang."""

import subprocess
import sys

import fuzz
import fuzz_ops
import pytest
import torch

from pyfeedback.ops import autograd

CASES = {"ops": 200, "optimizers": 200, "refusals": 300, "conversion": 50}


@pytest.fixture(scope="module")
def worker():
    """A separate process, since a case may crash it."""
    worker = fuzz.Worker()
    yield worker
    worker.stop()


@pytest.mark.parametrize("kind", CASES)
def test_the_first_cases_pass(kind, worker):
    problems = {number: worker.run(kind, number) for number in range(CASES[kind])}
    assert not [f"{fuzz.reproducer(kind, number)}: {what}" for number, what in problems.items() if what]


def test_a_number_is_a_case():
    assert fuzz_ops.random_call(7) == fuzz_ops.random_call(7) != fuzz_ops.random_call(8)
    first, second = (fuzz_ops.tensors_of(fuzz_ops.random_call(7), 7) for _ in range(2))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_calls_cover_every_kind_of_layer():
    calls = [fuzz_ops.random_call(number) for number in range(600)]
    assert {len(c.weight) for c in calls} == {2, 3, 4, 5}
    assert {c.op for c in calls} == {"linear", "conv2d", "convolution"}
    assert {c.dtype for c in calls} == set(fuzz_ops.FLOOR)
    assert {c.layout for c in calls} == set(fuzz_ops.LAYOUTS)
    assert {len(c.window) == 6 and c.window[3] for c in calls} == {False, True}
    windows = [c.window for c in calls if len(c.weight) == 4]
    for place in range(3):  # stride, padding and dilation differ between dimensions
        assert any(len(set(w[place])) > 1 for w in windows)
    assert any(c.window and c.window[-1] == c.input[1] > 1 for c in calls)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_gradient_is_found(monkeypatch, factor):
    """A feedback gradient that is wrong by a thousandth or not finite."""
    whole = autograd.gradients

    def off(call, grad_output, saved):
        grads = list(whole(call, grad_output, saved))
        grads[2] = None if grads[2] is None else grads[2] * factor
        return tuple(grads)

    monkeypatch.setattr(autograd, "gradients", off)
    numbers = [n for n in range(80) if looks_at_feedback(fuzz_ops.random_call(n))]
    found = 0
    for number in numbers:
        try:
            fuzz_ops.check(number)
        except AssertionError as error:
            found += "grad_feedback" in str(error)
    assert found >= len(numbers) > 3


def looks_at_feedback(call):
    """Whether the patched function computes a feedback gradient, in a dtype that resolves a thousandth."""
    learns = any(call.rule.get(name) for name in ("decay", "amp", "null", "sparse", "self_", "tie"))
    fine = call.dtype in (torch.float64, torch.float32) and call.mean == 0.0
    return learns and fine and call.needs[2] and call.ops == "function" and call.rule.get("samples") != 1


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """The name of a kind whose cases pass, fail, crash and hang in turn."""
    (tmp_path / "broken.py").write_text(
        "import os, time\n"
        "turn = 0\n"
        "def check(number):\n"
        "    global turn\n"
        "    turn += 1\n"
        "    if number % 4 == 1: raise ValueError('two\\nlines')\n"
        "    if number % 4 == 2: os.abort()\n"
        "    if number % 4 == 3: time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(fuzz, "HANGS", 2)
    return "broken"


def test_failures_crashes_and_hangs_are_reported_and_the_run_continues(broken):
    worker = fuzz.Worker()
    problems = [worker.run(broken, number) for number in (0, 1, 2, 0, 3, 0)]
    assert worker.stop() == 0
    assert problems == [
        "",
        "ValueError: two lines",
        "the process ended with status -6",
        "",
        "no answer within 2 seconds",
        "",
    ]


def test_every_failure_comes_with_the_command_that_repeats_it(broken, capsys):
    failed = fuzz.fuzz([broken], seed=3, seconds=60, cases=4)
    lines = capsys.readouterr().out.splitlines()
    assert failed > 0
    assert lines[0] == "seed 3, broken"
    commands = [line for line in lines if "--number" in line]
    assert len(commands) == failed
    assert all(f"fuzz.py --kind {broken} --number " in line for line in commands)
    assert lines[-1] == f"4 broken: {failed} failed"


def test_a_case_by_its_number():
    command = [sys.executable, fuzz.__file__, "--kind", "ops", "--number", "11"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ops 11: passed\n"), done.stderr
