"""torch's opcheck of the ops, and torch.compile of the layers and of the ops."""

import pytest
import torch
from cases import RULES, conv_tensors, fresh, gradients, largest_error, random_conv
from torch.library import opcheck

from pyfeedback import functional
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.core.geometry import LINEAR, Convolution, to_arguments
from pyfeedback.nn import Conv2d, Linear

# torch raises warnings about its own code during compilation.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
OPS = torch.ops.pyfeedback


@pytest.mark.parametrize("rule", ["fa", "wm-centered", "ia", "aa", "kp", "everything"])
@pytest.mark.parametrize("number", [1, 4, 6, 9])
def test_opcheck_conv2d(number, rule):
    case = random_conv(number)
    tensors = conv_tensors(case, number, torch.float32)
    opcheck(OPS.fa_conv2d.default, (*tensors, *case.window), RULES[rule])
    x, w, b, _ = (t if t is None else t.detach() for t in tensors)
    grad_output = torch.randn_like(torch.conv2d(x, w, None, *case.window))
    for mask in ([True] * 4, [False, True, True, False]):
        options = {**RULES[rule], "output_mask": mask}
        opcheck(OPS.fa_conv2d_backward.default, (grad_output, x, w, b, None, *case.window), options)


@pytest.mark.parametrize("rule", ["fa", "wm-centered", "ia", "aa", "kp", "everything"])
@pytest.mark.parametrize("size", [(4, 6), (3, 2, 6)], ids=str)
def test_opcheck_linear(size, rule):
    x, w, b = (torch.randn(s, requires_grad=True) for s in (size, (5, 6), (5, 6)))
    opcheck(OPS.fa_linear.default, (x, w, b), RULES[rule])
    x, w, b = (t.detach() for t in (x, w, b))
    opcheck(OPS.fa_linear_backward.default, (torch.randn(*size[:-1], 5), x, w, b), RULES[rule])


def test_opcheck_step_and_center():
    tensors = [[torch.randn(3, 4), torch.randn(7)] for _ in range(4)]
    options = {"decay": [0.1, 0.2], "self_": [0.3, 0.0], "tie": [0.0, 1.0], "lr": 0.1, "momentum": 0.9}
    opcheck(OPS.feedback_step_.default, tuple(tensors), options)
    opcheck(OPS.center.default, (torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last), 3))


@pytest.mark.parametrize("rule", ["fa", "ia", "everything"])
@pytest.mark.parametrize("number", [1, 6])
def test_opcheck_scheduled(number, rule):
    """Coefficients as a tensor: opcheck, and the gradients of the op with numbers."""
    case = random_conv(number)
    tensors = conv_tensors(case, number, torch.float64)
    named = Coefficients(**RULES[rule])._asdict()
    rest = {name: named.pop(name) for name in ("center", "samples", "normalize")}
    coefficients = torch.tensor(list(named.values()), dtype=torch.float64)
    geometry = to_arguments(Convolution(*case.window[:3], groups=case.groups))
    opcheck(OPS.scheduled_layer.default, (*tensors, coefficients, *geometry), {**rest, "positions": 3})
    grads = []
    for op, arguments, options in (
        (OPS.scheduled_layer, (coefficients, *geometry), {"positions": 2}),
        (OPS.fa_conv2d, case.window, {n: v / 2 if n in ("amp", "null", "sparse") else v for n, v in named.items()}),
    ):
        leaves = fresh(tensors)
        op(*leaves, *arguments, **rest, **options).square().sum().backward()
        grads.append(gradients(leaves))
    assert largest_error(*grads) < 1e-12
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((3, 2, 6), (5, 6), (5, 6)))
    linear = (x, w, b, None, coefficients, *to_arguments(LINEAR))
    opcheck(OPS.scheduled_layer.default, linear, {**rest, "positions": 1})


def compiles_to_the_same(module, x, backend, dynamic=None):
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in (x, x[:3], x[:4]):
        results = []
        for model in (module, compiled):
            module.zero_grad()
            input = batch.clone().requires_grad_()
            output = model(input)
            torch.manual_seed(1)
            output.backward(torch.randn(output.shape))
            parameters = [p for p in module.parameters() if p.requires_grad]
            results.append([output.detach(), input.grad, *(p.grad.clone() for p in parameters)])
        assert largest_error(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("rule", ["fa", "wm", "ia", "sa", "aa", "kp"])
@pytest.mark.parametrize("layer", ["conv3x3", "conv1x1", "linear"])
def test_layers_compile_whole(layer, rule):
    torch.manual_seed(0)
    if layer == "linear":
        compiles_to_the_same(Linear(6, 8, rule=rule), torch.randn(5, 3, 6), "aot_eager")
    else:
        kernel = int(layer[4])
        compiles_to_the_same(Conv2d(4, 8, kernel, bias=False, rule=rule), torch.randn(5, 4, 6, 6), "aot_eager")


@pytest.mark.parametrize("rule", ["fa", "ia"])
def test_layers_compile_with_inductor_and_a_dynamic_batch(rule):
    torch.manual_seed(0)
    model = torch.nn.Sequential(Conv2d(3, 4, 3, rule=rule), torch.nn.ReLU(), Conv2d(4, 6, 1, bias=False, rule=rule))
    compiles_to_the_same(model, torch.randn(5, 3, 8, 8), "inductor", dynamic=True)


@pytest.mark.parametrize("rule", ["fa", "ia", "everything"])
def test_op_compiles(rule):
    def function(x, w, b):
        return OPS.fa_conv2d(x, w, b, None, 1, 1, **RULES[rule])

    tensors = [torch.randn(s, requires_grad=True) for s in ((3, 4, 6, 6), (5, 4, 3, 3), (5, 4, 3, 3))]
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = fresh(tensors)
        f(*leaves).square().sum().backward()
        results.append(gradients(leaves))
    assert largest_error(results[1], results[0]) < 1e-5


def test_data_does_not_recompile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    layer = Conv2d(3, 4, 3, rule="ia")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(4):
        compiled(torch.randn(2, 3, 6, 6)).sum().backward()
    assert counter.frame_count == 1


def test_functions_equal_ops_under_autocast():
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((3, 4, 6, 6), (5, 4, 3, 3), (5, 4, 3, 3)))
    results = []
    for api in (functional, OPS):
        leaves = fresh([x, w, b])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = api.fa_conv2d(*leaves, **RULES["ia"])
        assert output.dtype is torch.bfloat16
        output.float().sum().backward()
        assert all(t.grad.dtype is torch.float32 for t in leaves)
        results.append(gradients(leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
