"""The compiled ops as a whole: when they are chosen, and their schemas."""

import torch
from extension_ops import cpu

from pyfeedback.backends import dispatch
from pyfeedback.backends.extension import loading


@cpu
def test_a_forced_backend_uses_the_kernels_that_exist_and_composes_the_rest():
    on_cuda = "extension" if loading.has_cuda() else "composite"
    for op in ("feedback_step_", "alignment_products", "center", "add_centered_"):
        chosen = [dispatch._choose(op, device, "extension") for device in ("cpu", "cuda", "meta")]
        assert chosen == ["extension", on_cuda, "composite"]
    for op in ("adamw_step_", "probe_gradients"):
        chosen = [dispatch._choose(op, device, "extension") for device in ("cpu", "cuda")]
        assert chosen == ["extension", "composite"]


@cpu
def test_the_ops_pass_opcheck_on_their_schema():
    torch.library.opcheck(
        torch.ops.pyfeedback.extension_feedback_step_.default,
        ([torch.ones(4)], [torch.ones(4)], [], [torch.zeros(4)]),
        {"decay": [0.1], "self_": [0.2], "tie": [0.0], "lr": 0.5, "momentum": 0.9},
        test_utils="test_schema",
    )
    torch.library.opcheck(
        torch.ops.pyfeedback.extension_alignment_products.default,
        ([torch.ones(4), torch.ones(2, 3)], [torch.ones(4), torch.ones(2, 3)]),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.pyfeedback.extension_center.default, (torch.ones(4, 3), 2), test_utils="test_schema"
    )
    probes = torch.ones(4, 6), torch.ones(4, 6), torch.ones(8), torch.arange(3), torch.ones(1, 1)
    torch.library.opcheck(
        torch.ops.pyfeedback.extension_probe_gradients.default, (*probes, [1.0] * 5, True), test_utils="test_schema"
    )
