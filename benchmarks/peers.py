"""Common operations on a PyTorch model, applied to a model converted by BioTorch and one converted by pyfeedback.

    pip install '.[peers]' && python benchmarks/peers.py        # prints the table of docs/peers.md

Both convert to feedback alignment, or to frsf (feedback with the signs of W) where noted. A check passes if it returns;
otherwise the table names the exception.
"""

import contextlib
import copy
import io
import math
import pickle
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrizations

import pyfeedback


class PyFeedback:
    """This package."""

    @staticmethod
    def convert(model: nn.Module, rule: str = "fa") -> nn.Module:
        return pyfeedback.convert(model, rule)

    @staticmethod
    def constrained(model: nn.Module) -> nn.Module:
        """A layer whose W has a constant norm."""
        for layer in pyfeedback.convert(model, "fa"):
            parametrizations.weight_norm(layer, dim=None)
            layer.parametrizations.weight.original0.requires_grad_(False)
        return model

    @staticmethod
    def angle(layer: nn.Module) -> float:
        return pyfeedback.alignment(layer)[""].angle

    @staticmethod
    def change(layer: nn.Module) -> None:
        """Give one layer other options."""
        layer.rule = pyfeedback.rule(layer.rule, decay=0.1)

    @staticmethod
    def options(layer: nn.Module) -> str:
        return str(layer.rule)


class BioTorch:
    """BioTorch. Its conversion prints to stdout."""

    @staticmethod
    def convert(model: nn.Module, rule: str = "fa", **options) -> nn.Module:
        from biotorch.module.biomodule import BioModule

        config = {"type": rule, "options": {"constrain_weights": False, "gradient_clip": False, "init": "xavier"}}
        config["options"].update(options)
        with contextlib.redirect_stdout(io.StringIO()):
            return BioModule(model, rule, copy_weights=True, layer_config=config).module

    @staticmethod
    def constrained(model: nn.Module) -> nn.Module:
        return BioTorch.convert(model, constrain_weights=True)

    @staticmethod
    def angle(layer: nn.Module) -> float:
        return float(layer.compute_alignment())

    @staticmethod
    def change(layer: nn.Module) -> None:
        """Give one layer other options."""
        layer.options["constrain_weights"] = True

    @staticmethod
    def options(layer: nn.Module) -> str:
        return str(layer.options)


Package = type[PyFeedback] | type[BioTorch]


class Check(NamedTuple):
    """A row of the table: the operation, the test of this repository that covers it, and the function."""

    what: str
    test: str
    run: Callable[[Package], None]


CHECKS: list[Check] = []


def check(what: str, test: str):
    """Decorator that registers a function as a row."""
    return lambda run: CHECKS.append(Check(what, test, run)) or run


def conv(**options) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 6, 3, **options))


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5))


def images() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, requires_grad=True)


def learns(model: nn.Module, x: torch.Tensor) -> None:
    """Whether the weights of the model and its input receive gradients."""
    model(x).square().sum().backward()
    assert x.grad is not None, "the input has no gradient"
    assert next(model.parameters()).grad is not None, "the weight has no gradient"


# Layers


@check('`padding="same"`', "test_padding_same_and_valid_are_their_numbers")
def _(package):
    learns(package.convert(conv(padding="same")), images())


@check('`padding_mode="reflect"`', "test_conv_forward_is_torch_nn_bit_for_bit")
def _(package):
    plain, x = conv(padding=1, padding_mode="reflect"), images()
    assert torch.equal(package.convert(copy.deepcopy(plain))(x), plain(x)), "another output than before"


@check("an unbatched image", "test_unbatched_backward_is_a_batch_of_one")
def _(package):
    learns(package.convert(conv()), torch.randn(4, 8, 8, requires_grad=True))


@check("a linear layer of tokens, [N, L, C]", "test_linear_backward_is_the_reference")
def _(package):
    learns(package.convert(linear()), torch.randn(2, 3, 6, requires_grad=True))


@check("channels_last gradients of channels_last images", "test_gradients_keep_channels_last")
def _(package):
    x = images().detach().to(memory_format=torch.channels_last).requires_grad_()
    seen = []
    held = x * 1
    held.register_hook(lambda grad: seen.append(grad.is_contiguous(memory_format=torch.channels_last)))
    package.convert(conv().to(memory_format=torch.channels_last))(held).square().sum().backward()
    assert seen == [True], "grad_input is contiguous"


@check("an empty batch", "test_empty_batch_has_zero_gradients")
def _(package):
    learns(package.convert(conv()), torch.randn(0, 4, 8, 8, requires_grad=True))


# Conversion


@check("one layer as the model", "test_a_single_layer_is_a_model")
def _(package):
    model = package.convert(nn.Linear(6, 5))
    x = torch.randn(2, 6, requires_grad=True)
    model(x).sum().backward()
    assert not torch.allclose(x.grad, model.weight.sum(0).expand_as(x)), "not converted"


@check("dtype and eval mode are kept", "test_everything_but_the_feedback_is_kept")
def _(package):
    model = package.convert(conv().double().eval())
    assert not model[0].training, "back in training mode"
    model(images().double())


@check("the meta device is kept", "test_the_meta_device_is_kept")
def _(package):
    with torch.device("meta"):
        model = conv()
    devices = {p.device.type for p in package.convert(model).parameters()}
    assert devices == {"meta"}, f"parameters on {', '.join(sorted(devices))}"


@check("hooks are kept", "test_everything_but_the_feedback_is_kept")
def _(package):
    model, calls = conv(), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    package.convert(model)(images())
    assert calls, "the hook is gone"


@check("a layer used twice stays one layer", "test_a_shared_layer_is_converted_once")
def _(package):
    layer = nn.Linear(4, 4)
    model = package.convert(nn.Sequential(layer, nn.ReLU(), layer))
    assert model[0] is model[2], "two layers now"


@check("a layer's options are its own", "test_rules_may_differ_between_parts_of_a_model")
def _(package):
    first, second = package.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    before = package.options(second)
    package.change(first)
    assert package.options(second) == before, "all layers changed with one"


@check("a subclass with a forward of its own keeps it", "test_layers_without_a_counterpart_are_skipped_and_reported")
def _(package):
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, x = nn.Sequential(Scaled(4, 6, 3)), images()
    assert torch.allclose(package.convert(copy.deepcopy(plain))(x), plain(x)), "another output than before"


# Transforms


@check("`torch.autocast` to bfloat16", "test_autocast")
def _(package):
    model = package.convert(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(216, 5)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images()).float().square().sum()
    loss.backward()


@check("`torch.compile(fullgraph=True)`", "test_a_whole_model_compiles_without_a_break")
def _(package):
    torch._dynamo.reset()
    learns(torch.compile(package.convert(conv()), fullgraph=True, backend="aot_eager"), images())


@check("`torch.func.vmap` over samples", "test_torch_func_vmap")
def _(package):
    model = package.convert(linear())
    torch.func.vmap(model)(torch.randn(3, 2, 6))


@check("`torch.func.grad`", "test_torch_func_grad")
def _(package):
    model = package.convert(conv())
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(model, p, images().detach()).square().sum())(parameters)


@check("double backward raises, and computes nothing wrong", "test_double_backward_raises")
def _(package):
    model, x = package.convert(conv()), images()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    try:
        torch.autograd.grad(grad.square().sum(), x)
    except RuntimeError:
        return
    raise AssertionError("a value without a warning")


@check("weight_norm on W", "test_weight_norm_and_other_parametrizations")
def _(package):
    model = package.convert(conv())
    parametrizations.weight_norm(model[0])
    learns(model, images())


# Rules


@check("frsf, compiled whole", "test_every_rule_compiles_whole")
def _(package):
    torch._dynamo.reset()
    learns(torch.compile(package.convert(conv(), "frsf"), fullgraph=True, backend="aot_eager"), images())


@check("under frsf the angle reported is that of the feedback used", "test_signs_align")
def _(package):
    layer = package.convert(linear(), "frsf")[0]
    x = torch.zeros(5, 6, requires_grad=True)
    layer(x).backward(torch.eye(5))  # the gradient of x is the feedback
    cosine = nn.functional.cosine_similarity(x.grad.flatten(), layer.weight.flatten(), dim=0)
    used, reported = math.degrees(math.acos(float(cosine))), package.angle(layer)
    assert abs(used - reported) < 0.1, f"{reported:.0f} degrees reported, {used:.0f} used"


@check("W of constant norm learns", "test_weight_norm_and_other_parametrizations")
def _(package):
    model = package.constrained(linear())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, before = torch.randn(4, 6), model[0].weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(model[0].weight / model[0].weight.norm(), before / before.norm()), "W stands still"


# Checkpoints


@check(
    "a checkpoint of the plain model loads strictly",
    "test_checkpoint_of_the_plain_layer_loads_and_the_missing_feedback_is_logged",
)
def _(package):
    package.convert(conv()).load_state_dict(conv().state_dict(), strict=True)


@check("deepcopy and pickle", "test_copies_are_equal_and_independent")
def _(package):
    learns(pickle.loads(pickle.dumps(copy.deepcopy(package.convert(conv())))), images())


@check("`torch.load(weights_only=True)` of a saved state", "test_functional_call_and_saved_weights")
def _(package):
    model = package.convert(conv())
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "state.pt")
        model.load_state_dict(torch.load(Path(folder) / "state.pt", weights_only=True))


@check("meta device, `to_empty`, `reset_parameters`", "test_meta_device_then_empty_then_reset")
def _(package):
    with torch.device("meta"):
        model = package.convert(conv())
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(float("nan"))
    model[0].reset_parameters()
    assert all(p.isfinite().all() for p in model.parameters()), "the feedback is not drawn again"


def outcome(run: Callable[[Package], None], package: Package) -> str:
    """The result of a check: "yes", or the problem in a few words."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(package)
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        return f"**{line}**" if isinstance(error, AssertionError) else f"**{type(error).__name__}**"
    return "yes"


def main() -> None:
    """Print the table."""
    print(f"| operation | BioTorch {version('biotorch')} | pyfeedback | test |")
    print("|---|---|---|---|")
    for what, test, run in CHECKS:
        print(f"| {what} | {outcome(run, BioTorch)} | {outcome(run, PyFeedback)} | `{test}` |")
    print(f"\ntorch {torch.__version__}")


if __name__ == "__main__":
    main()
