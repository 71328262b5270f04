"""The compiled ops as a whole: when they are taken, and their schemas."""

import torch
from native_ops import cpu

import pyfeedback
from pyfeedback import native, providers


@cpu
def test_a_forced_backend_takes_the_kernels_that_there_are_and_composes_the_rest():
    with pyfeedback.backend("native"):
        on_cuda = "native" if native.has_cuda() else "aten"
        for op in ("feedback_step_", "alignment_products", "center", "add_centered_"):
            assert [providers._choose(op, device) for device in ("cpu", "cuda", "meta")] == ["native", on_cuda, "aten"]
        assert [providers._choose("adamw_step_", device) for device in ("cpu", "cuda")] == ["native", "aten"]


@cpu
def test_the_ops_pass_opcheck_on_their_schema():
    torch.library.opcheck(
        torch.ops.pyfeedback.native_feedback_step_.default,
        ([torch.ones(4)], [torch.ones(4)], [], [torch.zeros(4)]),
        {"decay": [0.1], "self_": [0.2], "tie": [0.0], "lr": 0.5, "momentum": 0.9},
        test_utils="test_schema",
    )
    torch.library.opcheck(
        torch.ops.pyfeedback.native_alignment_products.default,
        ([torch.ones(4), torch.ones(2, 3)], [torch.ones(4), torch.ones(2, 3)]),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(torch.ops.pyfeedback.native_center.default, (torch.ones(4, 3), 2), test_utils="test_schema")
