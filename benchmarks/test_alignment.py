"""Angles and norms of all (feedback, weight) pairs of a model: one call against a Python loop over the layers."""

import pytest
import torch
from implementations import SUBJECT
from selection import DTYPES
from timing import Step
from torch import nn

import pyfeedback
from pyfeedback.testing import RESNET50


@pytest.fixture(scope="module")
def resnet50():
    """The convolutions and the classifier of ResNet-50 in a Sequential that is never called."""
    torch.manual_seed(0)
    convolutions = [
        nn.Conv2d(s.in_channels, s.out_channels, s.kernel, bias=False) for s in RESNET50 for _ in range(s.repeats)
    ]
    return pyfeedback.convert(nn.Sequential(*convolutions, nn.Linear(2048, 1000)), "fa")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_alignment(race, selection, resnet50, memory_format, dtype_name):
    device, dtype = selection.device, DTYPES[dtype_name]
    model = resnet50.to(device, dtype, memory_format=memory_format)
    pairs = [(layer.feedback.detach(), layer.weight.detach()) for _, layer in pyfeedback.feedback_layers(model)]

    def once():
        return [(found.angle, found.norm_ratio) for found in pyfeedback.alignment(model).values()]

    steps = {
        SUBJECT: once,
        "float64 loop": lambda: loop(pairs, torch.float64),
        "plain loop": lambda: loop(pairs, dtype),
    }
    for name in (SUBJECT, "float64 loop"):
        check(steps[name](), pairs)
    race(
        "alignment",
        {name: Step(run) for name, run in steps.items()},
        hide_launches=False,
        group=f"alignment {dtype_name}",
        dtype=dtype_name,
        layout=str(memory_format).removeprefix("torch."),
        bytes=sum(b.numel() + w.numel() for b, w in pairs) * dtype.itemsize,
    )


def loop(pairs, dtype):
    """(angle, norm ratio) of each pair by PyTorch calls in ``dtype``, with a single synchronization."""
    found = []
    for b, w in pairs:
        b, w = b.to(dtype).flatten(), w.to(dtype).flatten()
        b_norm, w_norm = b.norm(), w.norm()
        cosine = torch.dot(b, w) / (b_norm * w_norm)
        found.append(torch.stack([torch.rad2deg(torch.acos(cosine.clamp(-1, 1))), b_norm / w_norm]))
    return torch.stack(found).tolist()


def check(found, pairs):
    expected = loop([(b.double(), w.double()) for b, w in pairs], torch.float64)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-9, atol=1e-9)
