"""Tensors without memory (freed or on the meta device) are refused before anything is read or written."""

import pytest
import torch
from step_operands import PATHS, adamw_lists, adamw_step, lists, refuses, step

import pyfeedback
from pyfeedback.backends.extension import loading


@pytest.fixture(params=PATHS, autouse=True)
def path(request):
    with pyfeedback.backend(request.param):
        yield request.param


# Freed storage


def freed(like, keep=0):
    tensor = like.clone()
    tensor.untyped_storage().resize_(keep)
    return tensor


@pytest.mark.parametrize("keep", [0, 8])
@pytest.mark.parametrize("name", ["feedback", "weight", "grad", "momentum_buffer"])
def test_freed_storage_is_refused(name, keep):
    operands = lists(2)
    operands[name][1] = freed(operands[name][1], keep)
    refuses(step, operands, f"{name}[1] has storage of {keep} bytes, expected 192")


@pytest.mark.parametrize("name", ["param", "weight", "grad", "exp_avg", "exp_avg_sq", "step"])
def test_adamw_refuses_freed_storage(name):
    operands = adamw_lists(2)
    operands[name][1] = freed(operands[name][1])
    refuses(adamw_step, operands, f"{name}[1] has storage of 0 bytes, expected")


@pytest.mark.parametrize("which", [0, 1])
def test_alignment_refuses_freed_storage(which):
    operands = [torch.ones(4), torch.ones(4)]
    operands[which] = freed(operands[which])
    with pytest.raises(ValueError, match=r"^\w+\[0\] has storage of 0 bytes, expected 16$"):
        pyfeedback.metrics.angle(*operands)


def test_center_refuses_freed_storage():
    with pytest.raises(ValueError, match=r"^input has storage of 0 bytes, expected 48$"):
        torch.ops.pyfeedback.center(freed(torch.ones(4, 3)), 2)


@pytest.mark.skipif(not loading.has_cpu(), reason="the CPU library is not built")
@pytest.mark.parametrize("which", range(6))
def test_the_compiled_ops_refuse_freed_storage(which):
    """Also when called directly. Before torch 2.13, the dispatcher drops the message of a library's error."""
    x, dy, w, m = torch.ones(2, 4, 6, 6), torch.ones(2, 4, 4, 4), torch.ones(4, 1, 3, 3), torch.ones(1, 4, 6, 6)
    tensors = [dy, x, w, w.clone(), m, torch.ones(2, 4, 4, 4)]
    tensors[which] = freed(tensors[which])
    numbers = ([1, 1], [0, 0], [1, 1], 4, [0.1] * 6, 2, True, True, True, True)
    with pytest.raises(RuntimeError):
        torch.ops.pyfeedback.extension_depthwise_backward(*tensors, torch.ones(1, 4, 4, 4), *numbers)
    with pytest.raises(RuntimeError):
        torch.ops.pyfeedback.extension_center(freed(torch.ones(4, 3)), 2)


# Meta tensors


@pytest.mark.parametrize("name", ["feedback", "weight", "grad", "momentum_buffer"])
def test_meta_tensors_are_refused(name):
    operands = lists(2)
    operands[name][1] = operands[name][1].to("meta")
    refuses(step, operands, f"{name}[1] is ")


def test_a_step_of_only_meta_tensors_is_refused():
    operands = {name: [t.to("meta") for t in ts] for name, ts in lists(2).items()}
    message = r"feedback\[0\] is on meta, expected a device with memory"
    with pytest.raises(ValueError, match=message):
        step(operands)
    numbers = {"decay": [0.1] * 2, "self_": [0.2] * 2, "tie": [0.3] * 2, "lr": 0.1, "momentum": 0.9}
    for op in (torch.ops.pyfeedback.feedback_step_, torch.ops.pyfeedback.extension_feedback_step_):
        with pytest.raises(ValueError, match=message):
            op(**operands, **numbers)


@pytest.mark.parametrize("which", [(0,), (2,), range(4)])
def test_the_compiled_backward_refuses_meta_tensors(which):
    tensors = [torch.ones(2, 4, 4, 4), torch.ones(2, 4, 6, 6), torch.ones(4, 1, 3, 3), torch.ones(4, 1, 3, 3)]
    for i in which:
        tensors[i] = tensors[i].to("meta")
    numbers = ([1, 1], [0, 0], [1, 1], 4, [0.1] * 6, 2, True, True, True, True)
    with pytest.raises((ValueError, RuntimeError), match="is on meta, expected a device with memory"):
        torch.ops.pyfeedback.extension_depthwise_backward(*tensors, None, None, None, *numbers)
