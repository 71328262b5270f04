"""The update of all feedback weights: the compiled feedback_step_ against the composition of torch._foreach."""

import pytest
import torch
from implementations import SUBJECT
from selection import DTYPES, RULES
from timing import Step

import pyfeedback
from pyfeedback.testing import RESNET50

TENSORS = 160
CHECKED = 20  # tensors per case
CASES = {str(size): [(size,)] * TENSORS for size in (64, 1024, 65536)}
CASES["1000"] = [(1000,)] * 300
CASES["ResNet-50"] = [
    *((s.out_channels, s.in_channels, s.kernel, s.kernel) for s in RESNET50 for _ in range(s.repeats)),
    (1000, 2048),
]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("update_rule", ["kp", "sa"])
@pytest.mark.parametrize("sizes", list(CASES))
def test_update(race, selection, sizes, update_rule, momentum, dtype_name):
    info, device, dtype = pyfeedback.build_info(), selection.device, DTYPES[dtype_name]
    if not (info.cuda if device.type == "cuda" else info.cpu):
        pytest.skip(f"no compiled library for {device.type}: {info.missing}")
    rule = RULES[update_rule]
    tensors = make_tensors(CASES[sizes], momentum, dtype, device)
    check({key: values[:CHECKED] for key, values in tensors.items()}, rule, momentum)
    moved = sum(t.numel() for t in tensors["feedback"]) * dtype.itemsize
    race(
        "update",
        {
            SUBJECT: update(tensors, rule, momentum, "extension"),
            "foreach": update(tensors, rule, momentum, "composite"),
        },
        group=f"feedback_step_ {sizes} {dtype_name}",
        sizes=sizes,
        tensors=len(CASES[sizes]),
        rule=update_rule,
        momentum=momentum,
        dtype=dtype_name,
        bytes=moved * (5 if momentum else 3),  # feedback and buffer read and written, and weight or its gradient read
    )


def make_tensors(shapes, momentum, dtype, device):
    torch.manual_seed(0)

    def draw():
        return [torch.randn(shape, device=device).to(dtype) for shape in shapes]

    return {"feedback": draw(), "weight": draw(), "grad": draw(), "momentum_buffer": draw() if momentum else []}


def update(tensors, rule, momentum, backend):
    """One update by this backend, which is selected outside the timing."""
    count = len(tensors["feedback"])
    options = {"decay": [rule.decay] * count, "self_": [rule.self_] * count, "tie": [rule.tie] * count}

    def run():
        pyfeedback.functional.feedback_step_(**tensors, **options, lr=1e-4, momentum=momentum)

    return Step(run, lambda: pyfeedback.set_backend(backend))


@pytest.fixture(autouse=True)
def restored_backend():
    before = pyfeedback.current_backend()
    yield
    pyfeedback.set_backend(before)


def check(tensors, rule, momentum):
    """Compare both backends with float64."""
    results = {}
    for name in ("extension", "composite", "float64"):
        wide = torch.float64 if name == "float64" else None
        copies = {key: [t.to(wide, copy=True) for t in values] for key, values in tensors.items()}
        step = update(copies, rule, momentum, "composite" if name == "float64" else name)
        step.prepare()
        step.run()
        results[name] = copies["feedback"]
    for name in ("extension", "composite"):
        for found, expected in zip(results[name], results["float64"], strict=True):
            error = (found.double() - expected).abs().max() / expected.abs().max()
            assert error <= 4 * torch.finfo(found.dtype).eps, f"{name}: {error:.1e}"
