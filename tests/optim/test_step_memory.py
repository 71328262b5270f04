"""Tensors of a step that share memory: supported sharing gives the same step on every path.

All other sharing is refused in one line before anything is written.
"""

import itertools
import random

import pytest
import torch
from step_operands import ALL, PATHS, adamw_lists, adamw_step, lists, refuses, step

import pyfeedback
from pyfeedback import functional
from pyfeedback.backends.extension import loading


@pytest.fixture(params=PATHS, autouse=True)
def path(request):
    with pyfeedback.backend(request.param):
        yield request.param


# Written tensors must not share memory


def overlapping(operands, name, i, other, j, kind):
    """Move tensor i of one list into the memory of tensor j of another list, entirely or partly."""
    shape = operands[name][i].shape
    whole = torch.randn(3 * shape.numel(), dtype=torch.float64)
    start = {"whole": 0, "part": 5, "transposed": 0, "columns": 1}[kind]
    operands[other][j] = whole[: shape.numel()].view(shape)
    if kind == "transposed":
        operands[name][i] = whole[: shape.numel()].view(shape[::-1]).t()
    elif kind == "columns":
        operands[name][i] = whole.as_strided(shape, (2 * shape[1], 2), start)
    else:
        operands[name][i] = whole[start : start + shape.numel()].view(shape)


@pytest.mark.parametrize("kind", ["whole", "part", "transposed", "columns"])
@pytest.mark.parametrize(
    ("name", "i", "other", "j"),
    [
        ("feedback", 2, "feedback", 0),
        ("momentum_buffer", 2, "momentum_buffer", 0),
        ("momentum_buffer", 0, "feedback", 0),
        ("momentum_buffer", 1, "feedback", 0),
        ("momentum_buffer", 0, "feedback", 2),
        ("weight", 0, "momentum_buffer", 0),
        ("grad", 0, "momentum_buffer", 2),
        ("grad", 2, "momentum_buffer", 0),
        ("weight", 2, "feedback", 0),  # it would read an updated tensor
        ("grad", 1, "feedback", 0),
        ("weight", 0, "feedback", 2),  # not the next row
        ("grad", 0, "feedback", 1),
    ],
)
def test_tensors_that_share_memory_are_refused(name, i, other, j, kind):
    operands = lists(3)
    overlapping(operands, name, i, other, j, kind)
    both = (f"{name}[{i}] shares memory with {other}[{j}], expected", f"{other}[{j}] shares memory with {name}[{i}]")
    with pytest.raises(ValueError, match="shares memory") as refused:
        step(operands)
    assert any(message in str(refused.value) for message in both)
    refuses(step, operands, str(refused.value))


def test_the_same_tensor_twice_is_refused():
    operands = lists(2)
    operands["feedback"][1] = operands["feedback"][0]
    refuses(step, operands, "feedback[1] shares memory with feedback[0], expected separate memory")


@pytest.mark.parametrize("kind", ["part", "transposed"])
@pytest.mark.parametrize("name", ["weight", "grad"])
def test_a_row_that_reads_another_part_of_itself_is_refused(name, kind):
    operands = lists(1)
    overlapping(operands, name, 0, "feedback", 0, kind)
    refuses(step, operands, f"{name}[0] shares memory with feedback[0], expected")


def test_tensors_that_overlap_themselves_are_refused():
    for name in ("feedback", "momentum_buffer"):
        for strides in ((0, 1), (1, 1), (2, 1)):
            operands = lists(2)
            operands[name][1] = torch.zeros(40, dtype=torch.float64).as_strided((4, 6), strides)
            refuses(step, operands, f"{name}[1] has more than one element at a memory location")


def test_a_dynamic_that_is_stepped_is_refused():
    operands = lists(2, size=(5,))
    dynamic = operands["feedback"][1]
    with pytest.raises(ValueError, match=r"dynamic shares memory with feedback\[1\], expected"):
        functional.feedback_step_(
            **operands, decay=[0.1] * 2, self_=[0.2] * 2, tie=[0.3] * 2, lr=0.1, momentum=0.9, dynamic=dynamic
        )


@pytest.mark.parametrize(
    ("name", "i", "other", "j"),
    [
        ("param", 1, "param", 0),
        ("exp_avg", 0, "param", 0),
        ("exp_avg_sq", 1, "exp_avg", 1),
        ("exp_avg_sq", 0, "param", 1),
        ("grad", 0, "exp_avg", 1),
        ("weight", 1, "param", 0),
        ("step", 1, "step", 0),
    ],
)
def test_adamw_refuses_tensors_that_share_memory(name, i, other, j):
    operands = adamw_lists(2)
    operands[name][i] = operands[other][j]
    with pytest.raises(ValueError, match="shares memory") as refused:
        adamw_step(operands)
    assert f"{name}[{i}]" in str(refused.value)
    assert f"{other}[{j}]" in str(refused.value)
    refuses(adamw_step, operands, str(refused.value))


# Sharing that the optimizers use


def expected_step(operands, momentum=0.9):
    """The definition of a step: compute all gradients, then write."""
    rows = list(zip(*(operands[name] for name in ("feedback", "weight", "grad", "momentum_buffer")), strict=True))
    gradients = [ALL["decay"] * f - ALL["self_"] * w + ALL["tie"] * g for f, w, g, _ in rows]
    buffers = [momentum * m + d for (*_, m), d in zip(rows, gradients, strict=True)]
    return [f - 0.5 * m for (f, *_), m in zip(rows, buffers, strict=True)], buffers


def assert_steps(operands):
    feedback, buffers = expected_step(operands)
    step(operands)
    for found, value in zip((*operands["feedback"], *operands["momentum_buffer"]), (*feedback, *buffers), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("readers", [1, 2, 5])
@pytest.mark.parametrize("arrange", ["dense", "strided"])
def test_a_weight_may_follow_the_rows_that_read_it(readers, arrange):
    operands = lists(2 * (readers + 1), size=(40, 70))
    for first in (0, readers + 1):
        w, g = operands["weight"][first], operands["grad"][first]
        w = w.t().contiguous().t() if arrange == "strided" else w
        for i in range(first, first + readers + 1):
            operands["weight"][i], operands["grad"][i] = w, g
        operands["feedback"][first + readers] = w
    assert_steps(operands)


def test_rows_that_share_a_gradient_are_grouped():
    """Rows that share a gradient are grouped, so the first may read the weight that the last one updates."""
    operands = lists(3, size=(40, 70))
    operands["grad"][1] = operands["grad"][2] = operands["grad"][0]
    operands["weight"][0] = operands["feedback"][2]
    assert_steps(operands)


def test_read_only_operands_may_share_memory():
    operands = lists(4)
    whole = torch.randn(60, dtype=torch.float64)
    operands["weight"] = [whole[i : i + 24].view(4, 6) for i in (0, 3, 3, 30)]
    operands["grad"] = [
        operands["weight"][3],
        whole[:1].expand(4, 6),
        whole[5:29].view(6, 4).t(),
        whole[:24].view(4, 6),
    ]
    assert_steps(operands)


@pytest.mark.parametrize("name", ["weight", "grad"])
def test_a_row_may_read_itself(name):
    operands = lists(3, size=(50, 41))
    operands[name][1] = operands["feedback"][1]
    assert_steps(operands)


def test_disjoint_views_of_one_storage_are_accepted():
    """Columns of a matrix, halves of a vector, and every other element."""
    operands = lists(6)
    matrix, vector = torch.randn(4, 18, dtype=torch.float64), torch.randn(96, dtype=torch.float64)
    operands["feedback"][:3] = matrix.split(6, 1)
    operands["feedback"][3], operands["momentum_buffer"][3] = vector[:24].view(4, 6), vector[24:48].view(4, 6)
    operands["feedback"][4], operands["weight"][5] = (vector[48 + k :: 2].view(4, 6) for k in range(2))
    assert_steps(operands)


def test_unread_operands_may_be_anything():
    operands, separate = lists(2), lists(2)
    freed = torch.ones(4, 6, dtype=torch.float64)
    freed.untyped_storage().resize_(0)
    for unread in ((operands["feedback"][1], operands["momentum_buffer"][0]), (freed, freed)):
        operands["weight"][0], operands["grad"][1] = unread
        for each in (operands, separate):
            step(each, self_=[0.0, 0.2], tie=[0.3, 0.0])
        for name in ("feedback", "momentum_buffer"):
            assert all(map(torch.equal, operands[name], separate[name]))


@pytest.mark.parametrize("size", [(0,), (3, 0)])
def test_empty_tensors_share_nothing(size):
    operands = lists(3)
    empty = torch.zeros(size, dtype=torch.float64)
    for name in operands:
        operands[name][0] = operands[name][2] = empty
    alone = {name: [tensors[1].clone()] for name, tensors in operands.items()}
    step(operands)
    step(alone)
    assert torch.equal(operands["feedback"][1], alone["feedback"][0])


def test_without_momentum_the_buffer_is_ignored():
    operands = lists(2)
    before = [t.clone() for t in operands["momentum_buffer"]]
    step(operands, momentum=0.0)
    assert all(torch.equal(t, b) for t, b in zip(operands["momentum_buffer"], before, strict=True))
    operands["momentum_buffer"] = operands["feedback"]  # not read, not written
    step(operands, momentum=0.0)


# Random views of one storage: both paths agree with a count of shared elements


def places(tensor):
    """The offsets of all elements in the storage."""
    offsets = torch.tensor(tensor.storage_offset())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return offsets.flatten().tolist()


def random_view(draw, storage):
    shape = (draw.choice((1, 2, 3)), draw.choice((1, 2, 3, 4)))
    strides = draw.choice([(shape[1], 1), (1, shape[0]), (8, 2), (2 * shape[1], 2), (5, 1), (3, 4), (6, 7)])
    view = storage.as_strided(shape, strides, draw.randrange(12))
    return view if len(set(places(view))) == view.numel() else random_view(draw, storage)


@pytest.mark.parametrize("seed", range(150))
def test_random_views_are_refused_where_they_share_an_element(seed):
    draw, storage = random.Random(seed), torch.randn(60, dtype=torch.float64)
    views = [random_view(draw, storage) for _ in range(2)]
    shared = bool(set(places(views[0])) & set(places(views[1])))
    weight, grad = ([torch.randn_like(v) for v in views] for _ in range(2))
    operands = {
        "feedback": views,
        "weight": weight,
        "grad": grad,
        "momentum_buffer": [torch.zeros_like(v) for v in views],
    }
    if shared:
        refuses(step, operands, "feedback[1] shares memory with feedback[0], expected separate memory")
    else:
        assert_steps(operands)


# Every pair of lists


def test_every_pair_of_operands_agrees_between_the_paths(path):
    """Both paths agree for each of the 64 pairs (list, row) that share memory in a step of three rows."""
    names = ("feedback", "weight", "grad", "momentum_buffer")
    for (name, i), (other, j) in itertools.combinations(itertools.product(names, range(3)), 2):
        verdicts = []
        for backend in ("extension", "composite") if loading.has_cpu() else ("composite",):
            operands = lists(3)
            operands[name][i] = operands[other][j]
            with pyfeedback.backend(backend):
                try:
                    step(operands)
                except ValueError as error:
                    verdicts.append(str(error))
                else:
                    verdicts.append([t.clone() for t in operands["feedback"]])
        if len(verdicts) == 2 and isinstance(verdicts[0], list):
            assert isinstance(verdicts[1], list), (name, i, other, j)
            torch.testing.assert_close(*verdicts, rtol=1e-13, atol=1e-13)
        else:
            assert len(set(verdicts)) == 1, (name, i, other, j, verdicts)
