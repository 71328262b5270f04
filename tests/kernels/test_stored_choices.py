"""What pyfeedback.tune stores, and when it is used."""

import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from tuning_cases import CPU, DIRECT, GRAM, IA, empty_folder, planned, signature, tensors

import pyfeedback
from pyfeedback.backends import choices
from pyfeedback.backends.choices import Choice
from pyfeedback.core.algorithm import Algorithm

folder = empty_folder


def test_nothing_is_measured_until_it_is_asked_for(folder):
    model = pyfeedback.convert(nn.Linear(4, 4), "ia")
    model(torch.randn(2, 4)).sum().backward()
    assert not folder.exists()


def test_a_stored_choice_is_used_for_this_layer_only(folder):
    input, weight = tensors(2, 16, 3, 3)
    assert planned(input, weight) is Algorithm.RESPONSE_GRAM
    path = choices.write(CPU, {str(signature(input, weight)): GRAM})
    assert path.parent == folder
    assert planned(input, weight) is Algorithm.INPUT_GRAM
    others = {
        "batch": (input.repeat(2, 1, 1, 1), weight, IA),
        "rule": (input, weight, IA._replace(center=True)),
        "dtype": (input.double(), weight.double(), IA),
        "layout": (input.to(memory_format=torch.channels_last), weight, IA),
    }
    for name, (x, w, rule) in others.items():
        assert planned(x, w, rule) is Algorithm.RESPONSE_GRAM, name
    assert planned(input, weight, IA._replace(amp=7.0)) is Algorithm.INPUT_GRAM  # the same terms


def test_a_forced_backend_and_the_switch_ignore_it(monkeypatch):
    input, weight = tensors(2, 16, 3, 3)
    choices.write(CPU, {str(signature(input, weight)): GRAM})
    with pyfeedback.backend("composite"):
        assert planned(input, weight) is Algorithm.RESPONSE_GRAM
    monkeypatch.setenv("PYFEEDBACK_TUNE", "off")
    choices.forget()
    assert planned(input, weight) is Algorithm.RESPONSE_GRAM
    monkeypatch.setenv("PYFEEDBACK_TUNE", "always")
    choices.forget()
    with pytest.raises(ValueError, match="PYFEEDBACK_TUNE is 'always', expected one of cached, off"):
        planned(input, weight)


def test_a_backend_that_is_missing_now_is_not_used():
    input, weight = tensors(2, 16, 3, 3)
    choices.write(CPU, {str(signature(input, weight)): Choice("triton", Algorithm.DIRECT)})
    assert planned(input, weight) is Algorithm.RESPONSE_GRAM


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace(torch.__version__, "0.0"),
        lambda text: text.replace("input_gram", "an algorithm of another release"),
        lambda text: "[]",
    ],
)
def test_a_damaged_or_foreign_file_counts_as_absent(damage):
    input, weight = tensors(2, 16, 3, 3)
    path = choices.write(CPU, {str(signature(input, weight)): GRAM})
    path.write_text(damage(path.read_text()))
    choices.forget()
    assert planned(input, weight) is Algorithm.RESPONSE_GRAM
    choices.write(CPU, {str(signature(input, weight)): DIRECT})  # and is replaced
    assert planned(input, weight) is Algorithm.DIRECT


def test_a_fingerprint_names_the_software():
    found = choices.fingerprint(CPU)
    assert found["torch"] == torch.__version__
    assert {"device", "triton", "code", "machine", "capability", "threads"} <= found.keys()


def test_threads_that_write_at_once_lose_nothing():
    def add(number):
        choices.write(CPU, {f"layer {number}": DIRECT})

    threads = [threading.Thread(target=add, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert choices.read(CPU).keys() == {f"layer {number}" for number in range(16)}
    assert not list(choices.folder().glob("*.tmp"))


def test_processes_that_write_at_once_lose_nothing():
    program = (
        "import sys, torch\nfrom pyfeedback.backends import choices\nfrom pyfeedback.core.algorithm import Algorithm\n"
        "torch.set_num_threads(1)\n"
        "for i in range(20):\n"
        "    choices.write(torch.device('cpu'), {f'{sys.argv[1]} {i}': choices.Choice('composite', Algorithm.DIRECT)})"
    )
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        running = [subprocess.Popen([sys.executable, "-c", program, name]) for name in "ab"]
        assert [process.wait() for process in running] == [0, 0]
        assert len(choices.read(CPU)) == 40
    finally:
        torch.set_num_threads(torch_threads)
