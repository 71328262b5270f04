"""Direct feedback alignment with overlapping or recomputed passes of one model: threads and checkpointing."""

import copy
import pickle
import threading

import pytest
import torch
from small_networks import perceptron
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pyfeedback


class Blocks(nn.Module):
    """A sequence of blocks with two layers each. ``use`` calls a block."""

    def __init__(self, use=lambda block, x: block(x)):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(3))
        self.head = nn.Linear(6, 3)
        self.use = use

    def forward(self, x):
        for block in self.blocks:
            x = self.use(block, x).tanh()
        return self.head(x)


def made(use=lambda block, x: block(x)):
    return pyfeedback.convert(Blocks(use).double(), "dfa", init=pyfeedback.Init(seed=1))


def gradients(model, x):
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


def not_reentrant(block, x):
    return checkpoint(block, x, use_reentrant=False)


def test_threads_that_share_a_model_have_the_gradients_of_their_own_pass():
    model = made()
    inputs = [torch.randn(4, 6, dtype=torch.float64) for _ in range(8)]
    expected = [gradients(model, x) for x in inputs]
    wrong, together = [], threading.Barrier(len(inputs), timeout=60)

    def run(number):
        for _ in range(30):
            together.wait()
            found = gradients(model, inputs[number])
            if not all(map(torch.equal, found, expected[number])):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_passes_interleaved_layer_by_layer_are_separate():
    """Deterministic interleaving: the second pass runs between two layers of the first."""
    model = made()
    inputs = [torch.randn(4, 6, dtype=torch.float64) for _ in range(2)]
    expected = [gradients(model, x) for x in inputs]
    found = []

    def other(*_):
        handle.remove()
        thread = threading.Thread(target=lambda: found.append(gradients(model, inputs[1])))
        thread.start()
        thread.join()

    handle = model.blocks[1].register_forward_pre_hook(other)
    found.insert(0, gradients(model, inputs[0]))
    for ours, alone in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, alone))


def test_threads_draw_the_same_projections_at_their_first_pass():
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = gradients(made(), x)
    for _ in range(10):
        model, found, together = made(), [], threading.Barrier(4, timeout=60)

        def run(model=model, found=found, together=together):
            together.wait()
            found.append(gradients(model, x))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        for ours in found:
            assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("which", [[0], [1], [2], [0, 1, 2]], ids=str)
def test_reentrant_checkpointing_is_refused_with_the_name_of_the_layer(which):
    def use(block, x):
        chosen = any(block is model.blocks[i] for i in which)
        return reentrant(block, x) if chosen else block(x)

    model = made(use)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    loss = model(x).square().sum()
    with pytest.raises(RuntimeError) as refused:
        loss.backward()
    assert str(refused.value) == (
        f"blocks.{which[-1]}.0 is recomputed by reentrant checkpointing, in which dfa has no error signal for it: "
        "expected torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
    )
    model.use = not_reentrant  # the model still works
    for ours, alone in zip(gradients(model, x.detach()), gradients(made(), x.detach()), strict=True):
        torch.testing.assert_close(ours, alone)


def test_checkpointing_that_is_not_reentrant_changes_nothing():
    x = torch.randn(4, 6, dtype=torch.float64)
    for ours, plain in zip(gradients(made(not_reentrant), x), gradients(made(), x), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_whole_model_may_be_recomputed(use_reentrant):
    model = made()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    expected = gradients(model, x)
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    for p, plain in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, plain, rtol=0, atol=0)


def test_evaluation_and_parts_without_gradients_are_unaffected():
    model, x = made(), torch.randn(4, 6, dtype=torch.float64)
    plain = pyfeedback.unconvert(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model.blocks[0](x), plain.blocks[0](x))  # a block called alone

    def teach(block, x):
        with torch.no_grad():
            target = block(x)
        return block(x) + 0 * target

    model.use = teach
    for ours, alone in zip(gradients(model, x), gradients(made(), x), strict=True):
        torch.testing.assert_close(ours, alone)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_model_is_copied_in_the_middle_of_a_pass(duplicate):
    model, x = pyfeedback.convert(perceptron(6, 6, 3), "dfa"), torch.randn(4, 6)
    expected = gradients(model, x)
    copies = []

    def hook(*_):
        handle.remove()  # hooks cannot be pickled
        copies.append(duplicate(model.direct_feedback))

    handle = model[2].register_forward_hook(hook)
    model(x)
    assert len(copies) == 1
    twin = duplicate(model)
    assert all(map(torch.equal, gradients(twin, x), expected))


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns at a graph break
def test_compiled_passes():
    torch._dynamo.reset()
    model, x = made(), torch.randn(4, 6, dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager")
    expected = gradients(model, x)
    for _ in range(2):
        loss = F.mse_loss(compiled(x), torch.zeros(4, 3, dtype=torch.float64), reduction="sum")
        for ours, plain in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
            torch.testing.assert_close(ours, plain)
