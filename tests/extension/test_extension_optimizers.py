"""The compiled steps of a whole model: W right behind its B, and AdamW, against plain torch formulas in float64."""

import pytest
import torch
from extension_ops import (
    DTYPES,
    IMPLEMENTATIONS,
    PARAMETERS,
    SIZES,
    assert_as_accurate,
    dtype_id,
    random_like_model,
    step_formula,
)

import pyfeedback
from pyfeedback.backends.composite import steps as composite_steps
from pyfeedback.backends.dispatch import current_implementation
from pyfeedback.backends.extension import loading

SGD = {"lr": 0.05, "momentum": 0.9, "nesterov": True}
ADAMW = {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3}
RULES = {"kp": (0.01, 0.0, 1.0), "sa": (0.3, 0.2, 0.0), "mixed": (0.1, 0.2, 0.5)}  # decay, self_, tie
WEIGHT_DECAY = 0.02


@pytest.fixture(params=PARAMETERS[:2])  # not on a device: its tests copy tensors there, and what is shared is not then
def ops(request):
    return IMPLEMENTATIONS[request.param]


@pytest.fixture(params=["extension", "composite"])
def adamw_step_(request):
    if request.param == "composite":
        return composite_steps.adamw_step_
    if not loading.has_cpu():
        pytest.skip("the CPU library is not built")
    return current_implementation("adamw_step_", "cpu")


def arranged(tensor, letter):
    """c contiguous, l channels_last, s a strided slice of what else is nan."""
    if letter == "s":
        spread = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
        spread[..., ::2] = tensor
        return spread[..., ::2]
    return tensor.contiguous(memory_format=torch.channels_last if letter == "l" else torch.contiguous_format)


# W right behind the B that reads it


def step_pairs(ops, rule, feedback, weight, grad, feedback_buffer, weight_buffer):
    """B by the rule and W by its gradient, in one call, in place."""
    lists = ([feedback, weight], [weight, weight], [grad, grad], [feedback_buffer, weight_buffer])
    terms = zip(RULES[rule], (WEIGHT_DECAY, 0.0, 1.0), strict=True)
    names = ("decay", "self_", "tie")
    coefficients = {name: list(pair) * len(feedback) for name, pair in zip(names, terms, strict=True)}
    ops.extension_feedback_step_(*(in_turn(*pair) for pair in lists), **coefficients, **SGD)


def in_turn(*lists):
    return [each for together in zip(*lists, strict=True) for each in together]


def check_pairs(ops, rule, model):
    """Against B's formula with the old W, and W's."""
    start = [[t.clone() for t in tensors] for tensors in model]
    step_pairs(ops, rule, *model)
    stepped = zip(*(model[k] for k in (0, 1, 3, 4)), strict=True)
    for found, (b, w, g, b_buffer, w_buffer) in zip(stepped, zip(*start, strict=True), strict=True):
        both = [pair_formula(rule, *(t.to(d) for t in (b, w, g, b_buffer, w_buffer))) for d in (b.dtype, torch.float64)]
        for actual, composed, oracle in zip(found, *both, strict=True):
            assert_as_accurate(actual, composed, oracle)


def pair_formula(rule, b, w, g, b_buffer, w_buffer):
    decay, self_, tie = RULES[rule]
    b, b_buffer = step_formula(b, w, g, b_buffer, decay=decay, self_=self_, tie=tie, **SGD)
    w, w_buffer = step_formula(w, w, g, w_buffer, decay=WEIGHT_DECAY, self_=0.0, tie=1.0, **SGD)
    return b, w, b_buffer, w_buffer


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rule", RULES)
def test_a_weight_right_behind_its_feedback(ops, rule, dtype):
    check_pairs(ops, rule, [random_like_model(SIZES, dtype, seed) for seed in range(5)])


@pytest.mark.parametrize("formats", ["ccccc", "lllll", "lcccc", "cllcc", "clccs", "sssss", "ccclc", "cccsc"])
@pytest.mark.parametrize("rule", RULES)
def test_layouts_of_feedback_weight_gradient_and_buffers(ops, rule, formats):
    shapes = [(4, 6, 3, 3), (8, 3, 5, 7)]
    model = [random_like_model(shapes, torch.float32, seed) for seed in range(5)]
    check_pairs(ops, rule, [[arranged(t, f) for t in tensors] for tensors, f in zip(model, formats, strict=True)])


def test_two_feedback_weights_of_one_weight(ops):
    """Both read W as it was."""
    w, g, *rest = random_like_model([(5000,)] * 4, torch.float64)
    b, other, moved = rest[0], rest[1], w.clone()
    ops.extension_feedback_step_(
        [b, other, moved], [moved] * 3, [g] * 3, [], decay=[0.0] * 3, self_=[1.0, 1.0, 0.0], tie=[0.0, 0.0, 1.0], lr=0.5
    )  # fmt: skip
    first, second = random_like_model([(5000,)] * 4, torch.float64)[2:]
    for found, expected in ((b, first + 0.5 * w), (other, second + 0.5 * w), (moved, w - 0.5 * g)):
        assert_as_accurate(found, expected, expected)


@pytest.mark.skipif(not loading.has_cpu(), reason="the CPU library is not built")
def test_the_number_of_threads_changes_nothing():
    results, threads = [], torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        model = [random_like_model([(70001,), (3,), (40000, 2)], torch.float32, seed) for seed in range(5)]
        step_pairs(torch.ops.pyfeedback, "mixed", *model)
        results.append([*model[0], *model[1]])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# AdamW


def adamw_formula(param, weight, grad, mean, square, largest, *, step, rule, weight_decay, lr, beta1, beta2, eps):
    """(param, mean, square, largest square) after the step-th step, out of place and in the dtype given."""
    decay, self_, tie = rule
    gradient = decay * param
    if self_:
        gradient = gradient - self_ * weight
    if tie:
        gradient = gradient + tie * grad
    mean = beta1 * mean + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient * gradient
    largest = None if largest is None else torch.maximum(largest, square)
    root = ((square if largest is None else largest) / (1 - beta2**step)).sqrt()
    return (1 - lr * weight_decay) * param - lr / (1 - beta1**step) * mean / (root + eps), mean, square, largest


def check_adamw(adamw_step_, model, rules, steps, amsgrad=False):
    """`model`: param, weight, grad and the states; tensor i by rules[i] as its steps[i]-th step."""
    model = [model[0], model[1], model[2], model[3], [t.abs() for t in model[4]], [t.abs() for t in model[5]]]
    start = [[t.clone() for t in tensors] for tensors in model]
    counts = [torch.tensor(float(step - 1)) for step in steps]
    coefficients = {name: [r[i] for r in rules] for i, name in enumerate(("decay", "self_", "tie"))}
    decays = [i % 2 * WEIGHT_DECAY for i in range(len(rules))]
    states = model[3:] if amsgrad else model[3:5]
    adamw_step_(*model[:3], *states, step=counts, weight_decay=decays, **coefficients, **ADAMW)
    assert [count.item() for count in counts] == list(steps)
    for i, operands in enumerate(zip(*start, strict=True)):
        given = {"step": steps[i], "rule": rules[i], "weight_decay": decays[i], **ADAMW}
        operands = operands if amsgrad else (*operands[:5], None)
        wide = [None if t is None else t.double() for t in operands]
        composed, oracle = adamw_formula(*operands, **given), adamw_formula(*wide, **given)
        for tensors, near, exact in zip((model[0], *states), composed, oracle, strict=False):
            assert_as_accurate(tensors[i], near, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rule", [*RULES.values(), (0.0, 0.0, 1.0)], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_matches_the_formula(adamw_step_, rule, dtype, amsgrad):
    model = [random_like_model(SIZES, dtype, seed) for seed in range(6)]
    check_adamw(adamw_step_, model, [rule] * len(SIZES), range(1, 1 + len(SIZES)), amsgrad)


def test_adamw_of_three_hundred_tensors_of_mixed_dtypes_and_rules(adamw_step_):
    shapes = [(1 + 37 * i % 211, 1 + i % 5) for i in range(300)]
    model = [random_like_model(shapes, torch.float64, seed) for seed in range(6)]
    model = [[t.to(DTYPES[i % 4]) for i, t in enumerate(tensors)] for tensors in model]
    check_adamw(adamw_step_, model, [list(RULES.values())[i % 3] for i in range(300)], [1 + i for i in range(300)])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("formats", ["lllll", "lcccc", "clccc", "ccccs", "sscll"])
def test_adamw_layouts(adamw_step_, dtype, formats):
    shapes = [(4, 6, 3, 3), (8, 3, 5, 7)]
    model = [random_like_model(shapes, dtype, seed) for seed in range(6)]
    arrangement = zip(model, formats + formats[-1], strict=True)
    model = [[arranged(t, f) for t in tensors] for tensors, f in arrangement]
    check_adamw(adamw_step_, model, [RULES["mixed"]] * 2, (1, 9))


def test_adamw_of_a_weight_right_behind_its_feedback(adamw_step_):
    """B follows the old W."""
    w, g, b, *states = random_like_model([(50000,)] * 7, torch.float64)
    states = [t.abs() for t in states]
    old = [t.clone() for t in (b, w, *states)]
    terms = {"decay": [0.3, 0.0], "self_": [0.2, 0.0], "tie": [0.0, 1.0], "weight_decay": [0.0, WEIGHT_DECAY]}
    step = [torch.tensor(0.0), torch.tensor(4.0)]
    adamw_step_([b, w], [w, w], [w, g], states[:2], states[2:], step=step, **terms, **ADAMW)
    b_formula = adamw_formula(
        old[0], old[1], None, old[2], old[4], None, step=1, rule=(0.3, 0.2, 0), weight_decay=0, **ADAMW
    )
    w_formula = adamw_formula(
        old[1], None, g, old[3], old[5], None, step=5, rule=(0, 0, 1), weight_decay=WEIGHT_DECAY, **ADAMW
    )
    for found, expected in zip(((b, *states[::2]), (w, *states[1::2])), (b_formula, w_formula), strict=True):
        for t, value in zip(found, expected, strict=False):
            assert_as_accurate(t, value, value)


@pytest.mark.skipif(not loading.has_cpu(), reason="the CPU library is not built")
@pytest.mark.parametrize(
    "change",
    [
        {"grad": [torch.zeros(5)]},
        {"exp_avg": []},
        {"tie": []},
        {"exp_avg_sq": [torch.zeros(1).expand(4)]},
        {"step": [torch.tensor(0)]},
    ],
    ids=["shape", "no-state", "coefficients", "expanded", "step"],
)
def test_contradictory_arguments_raise_and_write_nothing(change):
    tensors = {name: [torch.ones(4)] for name in ("param", "weight", "grad", "exp_avg", "exp_avg_sq")}
    tensors["step"] = [torch.tensor(0.0)]
    numbers = {"decay": [0.1], "self_": [0.2], "tie": [0.3], "weight_decay": [0.0]}
    with pytest.raises(RuntimeError):
        torch.ops.pyfeedback.extension_adamw_step_(**(tensors | numbers | ADAMW | change))
    assert torch.equal(tensors["param"][0], torch.ones(4))
    assert tensors["step"][0] == 0


@pytest.mark.skipif(not loading.has_cpu(), reason="the CPU library is not built")
def test_the_op_passes_opcheck_on_its_schema():
    tensors = [*([torch.ones(4)] for _ in range(5)), [torch.tensor(0.0)]]
    numbers = {"decay": [0.1], "self_": [0.2], "tie": [0.3], "weight_decay": [0.0]}
    op = torch.ops.pyfeedback.extension_adamw_step_.default
    torch.library.opcheck(op, tuple(tensors), numbers | ADAMW, test_utils="test_schema")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "extension", "composite"])
def test_adamw_on_a_device(backend):
    def step(device):
        operands = [
            [t.abs().to(device) for t in random_like_model([(1,), (40000,)], torch.float64, i)] for i in range(5)
        ]
        counts = [torch.zeros((), device=device) for _ in range(2)]
        numbers = {"decay": [0.1] * 2, "self_": [0.2] * 2, "tie": [0.3] * 2, "weight_decay": [0.0, WEIGHT_DECAY]}
        current_implementation("adamw_step_", device)(*operands, step=counts, **numbers, **ADAMW)
        return [t.cpu() for tensors in operands for t in tensors]

    expected = step("cpu")
    with pyfeedback.backend(backend):
        for found, value in zip(step("cuda"), expected, strict=True):
            assert_as_accurate(found, value, value)
