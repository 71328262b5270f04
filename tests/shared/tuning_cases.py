"""What the tests of pyfeedback.tune share: a layer, its signature, and an empty folder for what is measured."""

import pytest
import torch

from pyfeedback.backends import choices, dispatch
from pyfeedback.backends.choices import Choice
from pyfeedback.core.algorithm import Algorithm
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import Convolution

CPU = torch.device("cpu")
DIRECT, GRAM = (Choice("composite", each) for each in (Algorithm.DIRECT, Algorithm.INPUT_GRAM))
IA = Coefficients(amp=0.5, null=0.5, decay=0.1)


@pytest.fixture(name="folder", autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """An empty folder for what is measured."""
    monkeypatch.setenv("PYFEEDBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PYFEEDBACK_TUNE", raising=False)
    choices.forget()
    yield tmp_path / "cache"
    choices.forget()
    dispatch.set_backend("auto")  # what was chosen among the backends of a test


def tensors(*shape, outputs=8, kernel=1):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(*shape, generator=generator)
    return input, torch.randn(outputs, shape[1], kernel, kernel, generator=generator)


def signature(input, weight, rule=IA, mask=(True,) * 4, saved=True, geometry=None):
    return choices.signature_of(geometry or Convolution(), input, weight, rule, mask, saved)


def planned(input, weight, rule=IA):
    call = dispatch.plan(Convolution(), input, weight, rule, (True,) * 4, True)
    return call.algorithm
