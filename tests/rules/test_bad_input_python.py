"""Bad arguments of conversion, rules, init, schedules, metrics and backends: a one-line error that names them."""

import math

import numpy as np
import pytest
import torch
from small_networks import perceptron
from torch import nn

import pyfeedback
from pyfeedback import Init, Monitor, Rule, schedules

NO_MODELS = {
    "None": (None, "None"), "string": ("model", "'model'"), "list": ([nn.Linear(2, 2)], "a list"),
    "class": (nn.Linear, "a type"), "function": (len, "a builtin_function_or_method"),
    "tensor": (torch.ones(2), "a tensor of shape (2,)"), "state": ({}, "a dict"),
}  # fmt: skip


def model(rule="ia"):
    return pyfeedback.convert(perceptron(3, 4, 2), rule)


def refuses(call, message):
    with pytest.raises((ValueError, TypeError)) as refused:
        call()
    text = str(refused.value)
    assert "\n" not in text
    assert text.startswith(message), text
    assert "expected" in text


MODEL_TAKERS = {
    "convert": lambda m: pyfeedback.convert(m, "ia"),
    "unconvert": pyfeedback.unconvert,
    "feedback_layers": lambda m: list(pyfeedback.feedback_layers(m)),
    "feedback_parameters": lambda m: list(pyfeedback.feedback_parameters(m)),
    "forward_parameters": lambda m: list(pyfeedback.forward_parameters(m)),
    "alignment": pyfeedback.alignment,
    "Monitor": Monitor,
    "Schedule": lambda m: schedules.Schedule(m, amp=schedules.constant(1.0)),
    "Alternation": lambda m: schedules.Alternation(m, 2),
    "start_small": pyfeedback.start_small,
    "GrowthControl": schedules.GrowthControl,
    "alignment_only": lambda m: schedules.alignment_only(m).__enter__(),
    "weight_transport": lambda m: pyfeedback.metrics.weight_transport(m).__enter__(),
}


@pytest.mark.parametrize("kind", NO_MODELS)
@pytest.mark.parametrize("taker", MODEL_TAKERS)
def test_not_a_model(taker, kind):
    value, shown = NO_MODELS[kind]
    refuses(lambda: MODEL_TAKERS[taker](value), f"model is {shown}, expected a torch.nn.Module")


CASES = {
    # convert
    "rule None": (lambda: pyfeedback.convert(nn.Linear(2, 2), None), "rule is None, expected a name or a pyfeedback"),
    "rule number": (lambda: pyfeedback.convert(nn.Linear(2, 2), 3), "rule is 3, expected a name or a pyfeedback.Rule"),
    "rule list": (lambda: pyfeedback.convert(nn.Linear(2, 2), ["ia"]), "rule is a list, expected a name or a pyfe"),
    "rule class": (lambda: pyfeedback.convert(nn.Linear(2, 2), Rule), "rule is a type, expected a name or a pyfeedb"),
    "no patterns": (lambda: pyfeedback.convert(nn.Linear(2, 2), {}), "rule is a dict without a pattern, expected"),
    "pattern": (lambda: pyfeedback.convert(nn.Linear(2, 2), {3: "ia"}), "a pattern of rule is 3, expected a string"),
    "rule of a pattern": (lambda: pyfeedback.convert(nn.Linear(2, 2), {"*": None}), "rule is None, expected a name"),
    "init": (lambda: pyfeedback.convert(nn.Linear(2, 2), "ia", init="normal"), "init is 'normal', expected a pyfee"),
    "init tensor": (lambda: pyfeedback.convert(nn.Linear(2, 2), "ia", init=torch.ones(2, 2)), "init is a tensor of"),
    "report": (
        lambda: pyfeedback.convert(nn.Linear(2, 2), "ia", return_report=1), "return_report is 1, expected True or Fal"
    ),
    # rules
    **{
        f"{name} {value!r}": (
            lambda name=name, value=value: Rule(**{name: value}),
            f"{name} is {value!r}, expected a finite number",
        )
        for name in ("decay", "amp", "null", "sparse", "self_", "tie")
        for value in (None, "1", True, math.inf, 1j)
    },
    "amp array": (lambda: Rule(amp=np.ones(2)), "amp is a numpy.ndarray of shape (2,), expected a finite number"),
    "amp tensor": (lambda: Rule(amp=torch.tensor(1.0)), "amp is a tensor of shape (), expected a finite number"),
    "center word": (lambda: Rule(center="no"), "center is 'no', expected True or False"),
    "center number": (lambda: Rule(center=1), "center is 1, expected True or False"),
    "transport None": (lambda: Rule(transport=None), "transport is None, expected True or False"),
    "samples word": (lambda: Rule(samples="all"), "samples is 'all', expected an int of 0 or more, or a float in"),
    "samples flag": (lambda: Rule(samples=True), "samples is True, expected an int of 0 or more, or a float in (0, 1]"),
    "samples negative": (lambda: Rule(samples=-1), "samples is -1, expected an int of 0 or more, or a float in (0, 1]"),
    "samples 0.0": (lambda: Rule(samples=0.0), "samples is 0.0, expected an int of 0 or more, or a float in (0, 1]"),
    "samples nan": (lambda: Rule(samples=math.nan), "samples is nan, expected an int of 0 or more, or a float in (0, "),
    "samples tensor": (lambda: Rule(samples=torch.tensor(1)), "samples is a tensor of shape (), expected an int of 0"),
    "reduction None": (lambda: Rule(reduction=None), "reduction is None, expected one of batch, mean"),
    "reduction list": (lambda: Rule(reduction=["mean"]), "reduction is a list, expected one of batch, mean"),
    "reduction array": (lambda: Rule(reduction=np.ones(2)), "reduction is a numpy.ndarray of shape (2,), expected one"),
    "signs flag": (lambda: Rule(signs=True), "signs is True, expected one of free, uniform, fixed, batch"),
    "direct None": (lambda: Rule(direct=None), "direct is None, expected one of no, each, shared"),
    "expansion half": (lambda: Rule(expansion=0.5), "expansion is 0.5, expected an int of 0 or more"),
    **{
        f"{name} {kind}": (
            lambda name=name, value=value: pyfeedback.rule("ia", **{name: value}), f"{name} is {text}, expected a fin"
        )
        for name in ("tau", "growth", "ratio", "nu")
        for kind, value, text in (("None", None, "None"), ("tensor", torch.ones(3), "a tensor of shape (3,)"))
    },
    "ratio without tau": (lambda: pyfeedback.rule("sa", ratio=2.0), "ratio is 2.0 in sa("),
    "nu without tau": (lambda: pyfeedback.rule("ia", nu=0.5), "nu is 0.5 in ia("),
    "rule of a layer": (lambda: setattr(model()[0], "rule", "xy"), "rule is 'xy', expected one of bp, fa, wm, ia, sa"),
    "rule of another kind": (
        lambda: setattr(model()[0], "rule", pyfeedback.rule("bp")),
        "rule is bp(transport=True), expected one with the kind of feedback weight of ia(",
    ),
    "parametrized feedback": (
        lambda: pyfeedback.optim.SGD(pruned()), "feedback of 0 is computed from other parameters, expected a parameter"
    ),
    "name number": (lambda: Rule(name=3), "name is 3, expected a string"),
    "unknown field": (lambda: pyfeedback.rule("ia", gain=1), "gain is not a field of a rule, expected one of decay, a"),
    "unknown rule": (lambda: pyfeedback.rule("backprop"), "rule is 'backprop', expected one of bp, fa, wm, ia, sa"),
    # init
    "init_fn": (lambda: Init(init_fn="normal"), "init_fn is 'normal', expected a function that fills a tensor"),
    "init_fn tensor": (lambda: Init(init_fn=torch.ones(2)), "init_fn is a tensor of shape (2,), expected a function"),
    "scale None": (lambda: Init(scale=None), "scale is None, expected a finite number"),
    "scale word": (lambda: Init(scale="big"), "scale is 'big', expected a finite number"),
    "scale nan": (lambda: Init(scale=math.nan), "scale is nan, expected a finite number"),
    "scale flag": (lambda: Init(scale=True), "scale is True, expected a finite number"),
    "scale array": (lambda: Init(scale=np.ones(3)), "scale is a numpy.ndarray of shape (3,), expected a finite number"),
    "density 0": (lambda: Init(density=0), "density is 0, expected a number above 0 and at most 1"),
    "density 2": (lambda: Init(density=2.0), "density is 2.0, expected a number above 0 and at most 1"),
    "density nan": (lambda: Init(density=math.nan), "density is nan, expected a number above 0 and at most 1"),
    "density None": (lambda: Init(density=None), "density is None, expected a number above 0 and at most 1"),
    "density flag": (lambda: Init(density=True), "density is True, expected a number above 0 and at most 1"),
    "init signs": (lambda: Init(signs="random"), "signs is 'random', expected one of free, weight"),
    "init signs None": (lambda: Init(signs=None), "signs is None, expected one of free, weight"),
    "init signs array": (lambda: Init(signs=np.ones(2)), "signs is a numpy.ndarray of shape (2,), expected one of fre"),
    "seed half": (lambda: Init(seed=0.5), "seed is 0.5, expected a 64-bit int or None"),
    "seed word": (lambda: Init(seed="0"), "seed is '0', expected a 64-bit int or None"),
    "seed flag": (lambda: Init(seed=True), "seed is True, expected a 64-bit int or None"),
    "seed large": (lambda: Init(seed=2**63), f"seed is {2**63}, expected a 64-bit int or None"),
    # curves and schedules
    "constant": (lambda: schedules.constant("1"), "value is '1', expected a finite number"),
    "constant nan": (lambda: schedules.constant(math.nan), "value is nan, expected a finite number"),
    "linear start": (lambda: schedules.linear(None, 1, 3), "start is None, expected a finite number"),
    "linear steps": (lambda: schedules.linear(0, 1, 0), "steps is 0, expected a finite number above 0"),
    "linear forever": (lambda: schedules.linear(0, 1, math.inf), "steps is inf, expected a finite number above 0"),
    "exponential end": (lambda: schedules.exponential(1, "2", 3), "end is '2', expected a finite number"),
    "exponential steps": (lambda: schedules.exponential(1, 2, -1), "steps is -1, expected a finite number above 0"),
    "exponential zero": (lambda: schedules.exponential(1, 0, 3), "start and end are 1 and 0, expected two numbers of"),
    "cyclic low": (lambda: schedules.cyclic([], 1, 3), "low is a list, expected a finite number"),
    "cyclic period": (lambda: schedules.cyclic(0, 1, 0), "period is 0, expected a finite number above 0"),
    "between first": (lambda: schedules.between(None, 3), "first is None, expected a finite number"),
    "between last": (lambda: schedules.between(0, "3"), "last is '3', expected a finite number"),
    "between curve": (lambda: schedules.between(0, 3, 1.0), "curve is 1.0, expected a function of the step"),
    "unknown curve": (lambda: schedules.Schedule(model(), gain=len), "gain is not a coefficient, expected one of deca"),
    "no curve": (lambda: schedules.Schedule(model(), amp=1.0), "amp is 1.0, expected a function of the step"),
    "curve of words": (lambda: schedules.Schedule(model(), amp=lambda _: "1"), "amp is '1' at step 0, expected a fini"),
    "curve of nan": (lambda: schedules.Schedule(model(), amp=lambda _: math.nan), "amp is nan at step 0, expected a f"),
    "no state": (
        lambda: schedules.Schedule(model(), amp=schedules.constant(1.0)).load_state_dict(None),
        "state is None, expected what state_dict returned",
    ),
    "other state": (
        lambda: schedules.Schedule(model(), amp=schedules.constant(1.0)).load_state_dict({"last": 1}),
        "state is a dict, expected what state_dict returned",
    ),
    "every 0": (lambda: schedules.Alternation(model(), 0), "every is 0, expected 1 or more"),
    "every half": (lambda: schedules.Alternation(model(), 1.5), "every is 1.5, expected an int of 1 or more"),
    "every None": (lambda: schedules.Alternation(model(), None), "every is None, expected an int of 1 or more"),
    "growth None": (lambda: schedules.GrowthControl(model(), None), "std is None, expected a finite number above 0"),
    "growth 0": (lambda: schedules.GrowthControl(model(), 0), "std is 0, expected a finite number above 0"),
    "growth nan": (lambda: schedules.GrowthControl(model(), math.nan), "std is nan, expected a finite number above 0"),
    # metrics
    "monitor 0": (lambda: Monitor(model(), 0), "every is 0, expected 1 or more"),
    "monitor half": (lambda: Monitor(model(), 0.5), "every is 0.5, expected an int of 1 or more"),
    "monitor flag": (lambda: Monitor(model(), True), "every is True, expected an int of 1 or more"),
    "monitor loss": (
        lambda: Monitor(model(), batch=(torch.ones(2, 3), torch.ones(2, 2)), loss="mse"),
        "loss is 'mse', expected a function of the model's output and the target",
    ),
    "no loss": (lambda: pyfeedback.alignment(model(), (torch.ones(2, 3), None)), "loss is None with a batch, expected"),
    "batch tensor": (
        lambda: pyfeedback.alignment(model(), torch.ones(2, 3), nn.functional.mse_loss),
        "batch is a tensor of shape (2, 3), expected a pair (input, target)",
    ),
    "batch of three": (
        lambda: pyfeedback.alignment(model(), (1, 2, 3), nn.functional.mse_loss),
        "batch is (1, 2, 3), expected a pair (input, target)",
    ),
    "loss of a vector": (
        lambda: pyfeedback.alignment(model(), (torch.ones(2, 3), None), lambda output, _: output),
        "loss returned a tensor of shape (2, 2), expected a tensor of one number",
    ),
    "monitor state": (lambda: Monitor(model()).load_state_dict([]), "state is a list, expected what state_dict return"),
    "monitor rows": (
        lambda: Monitor(model()).load_state_dict({"step": 1, "readings": [(1,)]}),
        "state is a dict, expected what state_dict returned",
    ),
    "angle": (lambda: pyfeedback.metrics.angle(torch.ones(2), None), "b is None, expected a tensor"),
    "angle shapes": (
        lambda: pyfeedback.metrics.angle(torch.ones(2), torch.ones(3)), "b has shape (3,), expected that of a, (2,)"
    ),
    "angle dtypes": (
        lambda: pyfeedback.metrics.angle(torch.ones(2), torch.ones(2).double()),
        "b is torch.float64 on cpu, expected the same as a, torch.float32 on cpu",
    ),
    "meta": (
        lambda: pyfeedback.alignment(model().to("meta")),
        "feedback of layer 0 is on meta, expected tensors with data",
    ),
    "another device": (
        lambda: pyfeedback.alignment(half_on_meta()),
        "weight of layer 0 is on meta, expected the device of its feedback, cpu",
    ),
    # backends
    "backend None": (lambda: pyfeedback.set_backend(None), "backend is None, expected one of auto, composite, extens"),
    "backend number": (lambda: pyfeedback.set_backend(3), "backend is 3, expected one of auto, composite, extension"),
    "backend list": (lambda: pyfeedback.backend(["auto"]).__enter__(), "backend is a list, expected one of auto, comp"),
}  # fmt: skip


def pruned():
    made = model()
    torch.nn.utils.prune.random_unstructured(made[0], "feedback", 0.5)
    return made


def half_on_meta():
    made = model()
    made[0].weight = nn.Parameter(made[0].weight.to("meta"))
    return made


@pytest.mark.parametrize("case", CASES)
def test_python_api(case):
    refuses(*CASES[case])


def test_a_refused_conversion_changes_nothing():
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for options in ({"rule": {"0": "ia", "1": "xy"}}, {"rule": "ia", "init": 3}, {"rule": "ia", "return_report": None}):
        with pytest.raises((ValueError, TypeError)):
            pyfeedback.convert(plain, **options)
        assert [type(m) for m in plain] == [nn.Linear] * 2


def test_numpy_numbers_are_accepted():
    rule = Rule(amp=np.float32(0.5), samples=np.int64(3), expansion=0)
    assert rule.coefficients(8, 1)[:2] == (0.0, 0.5)
    assert schedules.linear(np.float64(0), np.float32(1), np.int64(2))(1) == 0.5
    assert schedules.linear(0, 1, 1e3)(500) == 0.5
    assert Init(scale=np.float32(2), density=np.float64(0.5), seed=np.int64(3)).seed == 3
    model(rule)(torch.randn(4, 3)).sum().backward()
