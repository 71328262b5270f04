"""pyfeedback.tune: races of candidates on fakes and on the CPU, and the tuning of a model."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from tuning_cases import CPU, DIRECT, GRAM, IA, empty_folder, signature, tensors

import pyfeedback
from pyfeedback import tuning
from pyfeedback.backends import choices, dispatch
from pyfeedback.backends.choices import Choice
from pyfeedback.core.algorithm import Algorithm
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import LINEAR, Convolution

folder = empty_folder


A, B, C = (Choice(name, Algorithm.NONE) for name in "abc")


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({A: [1.0] * 8, B: [0.5] * 8}, B),
        ({A: [1.0] * 8, B: [0.97] * 8}, A),  # less than 5 %
        ({A: [1.0] * 8, B: [1.0] * 8}, A),  # a tie
        ({A: [1.0] * 8, B: [0.5] * 5 + [1.1] * 3}, A),  # not in three quarters of the rounds
        ({A: [1.0] * 8, B: [0.5] * 7 + [9.0]}, B),
        ({A: [1.0] * 8, B: [0.8] * 8, C: [0.6] * 8}, C),
        ({A: [1.0, 2.0, 4.0, 8.0], B: [0.5, 1.0, 2.0, 4.0]}, B),  # a machine that slows down
        ({A: [1.0] * 4}, A),
    ],
)
def test_winner(times, expected):
    assert tuning.winner(times, A) == expected


def fake_backends(monkeypatch, **backwards):
    """Further backends of ungrouped layers, which compute by these functions of the composed backward."""
    for name, function in backwards.items():
        composed = dispatch._LAYER_BACKENDS["composite"]

        def backward(call, *args, function=function, composed=composed):
            return function(composed.backward, call, *args)

        monkeypatch.setitem(dispatch._LAYER_BACKENDS, name, composed._replace(backward=backward))
    monkeypatch.setitem(dispatch._LAYERS, "layer", ("composite", *backwards))
    monkeypatch.setitem(dispatch._FASTEST, ("layer", "cpu"), ("composite",))
    dispatch.set_backend("auto")  # forgets the choices that were made


def slower(composed, call, *args):
    for _ in range(3):
        found = composed(call, *args)
    return found


def wrong(composed, call, *args):
    return tuple(None if grad is None else 1.01 * grad for grad in args[1:3] + args[2:3] + (None,))


def broken(composed, call, *args):
    raise RuntimeError("out of resources: shared memory\nRequired: 5")


def unfinished(composed, call, *args):
    return tuple(grad if grad is None else grad * float("nan") for grad in composed(call, *args))


def counting(used):
    """A backward that appends its algorithm to ``used``."""

    def counted(composed, call, *args):
        used.append(call.algorithm)
        return composed(call, *args)

    return counted


def test_wrong_and_broken_candidates_are_refused(monkeypatch):
    fake_backends(monkeypatch, wrong=wrong, broken=broken, unfinished=unfinished, slower=slower)
    input, weight = tensors(2, 16, 3, 3, kernel=3)
    rule = Coefficients(amp=0.5)
    report = tuning.race(signature(input, weight, rule), CPU, 0.05)
    assert {choice.backend: reason.partition(",")[0] for choice, reason in report.refused.items()} == {
        "wrong": report.refused[Choice("wrong", Algorithm.DIRECT)].partition(",")[0],
        "broken": "RuntimeError: out of resources: shared memory",
        "unfinished": "error inf",
    }
    assert "expected at most" in report.refused[Choice("wrong", Algorithm.DIRECT)]
    assert {choice.backend for choice in report.seconds} == {"composite", "slower"}
    assert report.choice == report.default == DIRECT
    assert report.gain == 1.0


def test_a_default_that_fails_raises(monkeypatch):
    fake_backends(monkeypatch)
    monkeypatch.setattr(tuning, "_run_of", lambda call, tensors: lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tuning.candidates(signature(*tensors(2, 16, 3, 3)), CPU)


def test_a_faster_candidate_wins_and_trains_the_model(monkeypatch):
    used = []
    fake_backends(monkeypatch, counted=counting(used))
    monkeypatch.setattr(tuning, "timer_of", lambda device: lambda run: 1.0 if uses(run, used) else 2.0)
    for rule in ("ia", "fa"):
        model = pyfeedback.convert(nn.Conv2d(16, 8, 3), rule)
        input = torch.randn(2, 16, 5, 5, requires_grad=True)
        report = pyfeedback.tune(model, input, budget=0.1, progress=False)
        (layer,) = report.layers
        assert layer.choice.backend == "counted"
        assert layer.gain == 2.0
        assert f"counted{'' if rule == 'fa' else ', direct'}" in str(report)
        used.clear()
        model(input).sum().backward()
        assert len(used) == 1
        with pyfeedback.backend("composite"):
            model(input).sum().backward()
        assert len(used) == 1


def uses(run, used):
    before = len(used)
    run()
    return len(used) > before


def test_candidates_on_the_cpu_are_all_correct():
    for geometry, shape, kernel in (
        (Convolution(), (2, 16, 5, 5), (8, 16, 1, 1)),
        (Convolution(stride=(2, 2)), (2, 16, 6, 6), (8, 16, 1, 1)),
        (Convolution(padding=(2, 2), groups=16), (2, 16, 9, 9), (16, 1, 5, 5)),
        (LINEAR, (6, 16), (8, 16)),
        (Convolution(transposed=True), (2, 8, 4, 4), (8, 6, 3, 3)),
    ):
        for rule in (IA, IA._replace(center=True), Coefficients(amp=0.5, sparse=0.5), Coefficients(decay=0.1)):
            each = choices.signature_of(geometry, torch.randn(shape), torch.randn(kernel), rule, (True,) * 4, True)
            found = tuning.candidates(each, CPU)
            assert all(candidate.refused is None for candidate in found), (each, found)
            pointwise = len(kernel) == 2 or max(kernel[2:]) == 1
            assert len(found) > 1 or not (pointwise and rule.reads_data)


def test_the_choice_has_little_regret():
    """Of a pointwise layer with many channels, measured anew: the choice takes at most 1.1 of the best time."""
    input, weight = tensors(8, 128, 14, 14, outputs=32)
    each = signature(input, weight)
    report = tuning.race(each, CPU, 1.0)
    again = tuning.race(each, CPU, 1.0)
    assert again.seconds[report.choice] <= 1.1 * min(again.seconds.values())
    assert len(report.seconds) == 3


# The model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return {"logits": self.fc(self.drop(self.norm(self.conv(x)).mean((2, 3)))), "extra": None}


def test_the_state_of_the_model_is_restored():
    torch.manual_seed(0)
    model = pyfeedback.convert(Net(), {"conv": "ia", "fc": "fa"})
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = pyfeedback.tune(model, torch.randn(4, 3, 6, 6, generator=torch.Generator()), budget=0.05, progress=False)
    assert len(report.layers) == 2
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.conv.weight.grad.eq(1).all()
    assert model.fc.weight.grad is None
    assert not model.conv.called
    assert json.loads(report.path.read_text())["fingerprint"] == choices.fingerprint(CPU)


def test_a_compiled_model_uses_the_choices(monkeypatch):
    used = []
    fake_backends(monkeypatch, counted=counting(used))
    model = pyfeedback.convert(nn.Conv2d(16, 8, 1, bias=False), "ia")
    input = torch.randn(2, 16, 3, 3)
    pyfeedback.tune(model, input, budget=0.05, progress=False)
    (key,) = choices.read(CPU)
    for algorithm in (Algorithm.DIRECT, Algorithm.INPUT_GRAM, Algorithm.RESPONSE_GRAM):
        choices.write(CPU, {key: Choice("counted", algorithm)})
        torch._dynamo.reset()
        used.clear()
        gradients = []
        for each in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            model.zero_grad()
            each(input).sum().backward()
            gradients.append(model.feedback.grad.clone())
        torch.testing.assert_close(*gradients)
        assert used == [algorithm, algorithm]


def test_a_choice_that_reads_a_response_is_not_used_without_one():
    input, weight = tensors(2, 16, 3, 3)
    arguments = Convolution(), input, weight, IA, (True,) * 4, False
    for choice in (DIRECT, GRAM):
        choices.write(CPU, {str(signature(input, weight)): choice})
        assert (dispatch.plan(*arguments).algorithm is choice.algorithm) == (choice is GRAM)


def test_bad_input(monkeypatch):
    model = pyfeedback.convert(nn.Linear(4, 4), "ia")
    with pytest.raises(TypeError, match="model is"):
        pyfeedback.tune("resnet", torch.randn(2, 4))
    with pytest.raises(ValueError, match="budget is 0"):
        pyfeedback.tune(model, torch.randn(2, 4), budget=0)
    with pytest.raises(RuntimeError, match="no layer with a feedback weight ran"):
        pyfeedback.tune(nn.Linear(4, 4), torch.randn(2, 4), progress=False)
    monkeypatch.setenv("PYFEEDBACK_TUNE", "off")
    with pytest.raises(ValueError, match="PYFEEDBACK_TUNE is off, expected cached"):
        pyfeedback.tune(model, torch.randn(2, 4), progress=False)
    with pyfeedback.backend("composite"), pytest.raises(ValueError, match="the backend is composite, expected auto"):
        pyfeedback.tune(model, torch.randn(2, 4), progress=False)


RANKS = """
import sys, torch
from torch import nn
import pyfeedback
from pyfeedback import tuning

rank, ranks, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=ranks)

def winner(times, default):
    by_name = {choice.algorithm.value: choice for choice in times if choice.backend == "composite"}
    return by_name["input_gram" if rank == 0 else "direct"]

tuning.winner = winner
torch.manual_seed(0)
layers = [pyfeedback.nn.Conv2d(16, 8 + i, 1, bias=False, rule="ia") for i in range(3)]
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(layers)
    def forward(self, x):
        return sum(layer(x).sum() for layer in self.layers)
group = torch.distributed.group.WORLD
report = pyfeedback.tune(Net(), torch.randn(2, 16, 3, 3), budget=0.2, group=group, progress=False)
print([str(layer.choice) for layer in report.layers])
torch.distributed.destroy_process_group()
"""


def test_ranks_share_the_work_and_agree(tmp_path):
    """Rank 0 measures the first and the third layer, rank 1 the second; each would choose otherwise alone."""
    commands = [[sys.executable, "-c", RANKS, str(rank), "2", str(tmp_path / "store")] for rank in range(2)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    printed = [process.communicate(timeout=120)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert printed[0] == printed[1]
    assert printed[0] == "['composite, input_gram', 'composite, direct', 'composite, input_gram']"
