"""The file of the compiled library."""

import re

import pytest
import torch

from pyfeedback import functional
from pyfeedback.backends.extension import loading

pytestmark = pytest.mark.skipif(not loading.has_cpu(), reason="the CPU library is not built")


def test_it_contains_no_path_of_the_build_machine():
    """Errors name their source by its path in the repository."""
    sources = re.findall(rb"[\w./+-]+\.(?:h|cpp|cuh|cu)\b", (loading.PACKAGE / loading.CPU_LIBRARY).read_bytes())
    assert any(source.startswith(b"csrc/") for source in sources)
    assert [source for source in sources if source.startswith(b"/")] == []


def test_errors_of_a_kernel_are_one_line_without_a_path():
    weight = torch.ones(*[2] * 9).permute(*reversed(range(9)))
    with pytest.raises(RuntimeError, match="expected at most 8") as refused:
        functional.feedback_step_([torch.ones(*[2] * 9)], [weight], [], decay=[0.1], self_=[0.1], tie=[0.0], lr=0.1)
    assert "\n" not in str(refused.value)
    assert "/" not in str(refused.value)
