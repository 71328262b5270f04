"""The compiled ops as a whole: when they are chosen, and their schemas."""

import torch
from native_ops import cpu

from pyfeedback.backends import dispatch
from pyfeedback.backends.extension import loading


@cpu
def test_a_forced_backend_uses_the_kernels_that_exist_and_composes_the_rest():
    on_cuda = "native" if loading.has_cuda() else "aten"
    for op in ("feedback_step_", "alignment_products", "center", "add_centered_"):
        chosen = [dispatch._choose(op, device, "native") for device in ("cpu", "cuda", "meta")]
        assert chosen == ["native", on_cuda, "aten"]
    assert [dispatch._choose("adamw_step_", device, "native") for device in ("cpu", "cuda")] == ["native", "aten"]


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
