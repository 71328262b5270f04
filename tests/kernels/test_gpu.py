"""Tests on a CUDA device: the ops through the same code, and the CUDA kernels of the compiled library."""

import pytest
import torch
from cases import RULES, conv_tensors, fresh, gradients, largest_error, random_conv

import pyfeedback
from pyfeedback import functional, reference
from pyfeedback.backends.extension import loading

pytestmark = pytest.mark.gpu
FLOOR = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def on_gpu(tensors):
    return [t if t is None else t.detach().cuda().requires_grad_() for t in tensors]


def step(op, tensors, case, rule, with_penalty=False):
    output = op(*tensors, *case.window, **rule)
    output, penalty = output if with_penalty else (output, None)
    torch.manual_seed(1)
    grad_output = torch.randn(output.shape).to(tensors[0].dtype).to(output)
    torch.autograd.backward([output], [grad_output])
    if with_penalty and penalty.requires_grad:
        penalty.backward()
    return [output.detach().cpu(), *(g.cpu() for g in gradients(tensors))]


@pytest.mark.parametrize("dtype", FLOOR, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("rule", RULES)
def test_conv2d_error_at_most_twice_pytorchs(rule, dtype):
    for number in range(40, 60):
        case = random_conv(number)
        rounded = conv_tensors(case, number, dtype)
        ours = step(functional.fa_conv2d, on_gpu(rounded), case, RULES[rule])
        plain = step(reference.conv2d, on_gpu(rounded), case, RULES[rule], with_penalty=True)
        exact = step(reference.conv2d, fresh(rounded, torch.float64), case, RULES[rule], with_penalty=True)
        for a, p, e in zip(ours, plain, exact, strict=True):
            assert largest_error([a], [e]) <= 2 * largest_error([p], [e]) + FLOOR[dtype], (number, case)


@pytest.mark.parametrize("rule", RULES)
def test_linear_in_float64(rule):
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((3, 4, 6), (9, 6), (9, 6)))
    results = []
    for device, op in (("cuda", functional.fa_linear), ("cpu", functional.fa_linear)):
        tensors = [t.to(device).requires_grad_() for t in (x, w, b)]
        op(*tensors, **RULES[rule]).square().sum().backward()
        results.append([g.cpu() for g in gradients(tensors)])
    assert largest_error(results[0], results[1]) < 1e-12


@pytest.mark.parametrize("backend", ["composite", "extension"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_feedback_step_equals_the_cpus(momentum, backend):
    if backend == "extension" and not loading.has_cuda():
        pytest.fail("the CUDA library was not built: PYFEEDBACK_CUDA=1 pip install .")
    torch.manual_seed(0)
    sizes = [1, 3, 1024, 4097, *range(200, 300)]
    tensors = [[torch.randn(s) for s in sizes] for _ in range(4)]
    options = {"decay": [0.1] * len(sizes), "self_": [0.2] * len(sizes), "tie": [0.5] * len(sizes), "lr": 0.3}
    results = []
    for device in ("cuda", "cpu"):
        copies = [[t.clone().to(device) for t in each] for each in tensors]
        with pyfeedback.backend(backend):
            functional.feedback_step_(*copies, **options, momentum=momentum, nesterov=momentum > 0, skip_nonfinite=True)
        results.append([t.cpu() for t in (*copies[0], *copies[3])])
    assert largest_error(*results) < 1e-6


def test_extension_step_skips_what_is_not_finite_and_draws_the_cpus_noise():
    sizes = [5, 4096, 70001]
    feedback = [torch.randn(s) for s in sizes]
    zeros = {"decay": [0.0] * 3, "self_": [0.0] * 3, "lr": 1.0, "skip_nonfinite": True}
    with pyfeedback.backend("extension"):
        moved = [[t.clone().to(device) for t in feedback] for device in ("cpu", "cuda")]
        for tensors in moved:
            functional.feedback_step_(tensors, [], [], tie=[0.0] * 3, noise=0.5, seed=7, **zeros)
        assert largest_error([t.cpu() for t in moved[1]], moved[0]) < 1e-5
        bad = [torch.full_like(t, float("nan") if t.numel() == 5 else 1.0) for t in moved[1]]
        before = [t.clone() for t in moved[1]]
        functional.feedback_step_(moved[1], [], bad, tie=[1.0] * 3, **zeros)
        assert all(torch.equal(a, b) for a, b in zip(moved[1], before, strict=True))


@pytest.mark.parametrize("count", [3, 160, 1000])
def test_extension_step_is_captured_in_a_cuda_graph(count):
    """A replay uses the current gradients and learning rate, and draws new noise."""
    feedback, grad = ([torch.randn(7 + i % 50, device="cuda") for i in range(count)] for _ in range(2))
    expected = [t.clone() for t in feedback]
    options = {"decay": [0.1] * count, "self_": [0.0] * count, "tie": [1.0] * count, "lr": 0.5, "noise": 0.1, "seed": 3}
    options["dynamic"] = torch.ones(5, dtype=torch.float64, device="cuda")

    def step(tensors):
        torch.ops.pyfeedback.extension_feedback_step_(tensors, [], grad, [], **options, skip_nonfinite=True)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(feedback)
    for value in (0.3, float("inf"), 0.7):
        grad[count // 2].fill_(value)
        options["dynamic"][0] /= 2
        options["dynamic"][4] += 1
        graph.replay()
        step(expected)
    assert all(torch.equal(a, b) for a, b in zip(feedback, expected, strict=True))


@pytest.mark.parametrize("optimizer", [pyfeedback.optim.FeedbackSGD, pyfeedback.optim.SGD])
def test_an_optimizer_in_a_cuda_graph_follows_its_learning_rate_and_draws_fresh_noise(optimizer):
    torch.manual_seed(0)
    model = pyfeedback.convert(torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 5)), "sa").cuda()
    rate = torch.tensor(0.0, device="cuda")
    with pyfeedback.backend("extension"):
        steps = optimizer(model, lr=rate, noise=0.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            steps.step()
    (feedback, _), moves = pyfeedback.feedback_parameters(model), []
    for value in (0.0, 1.0, 1.0):
        rate.fill_(value)
        before = feedback.detach().clone()
        graph.replay()
        moves.append(feedback.detach() - before)
    assert not moves[0].any()
    assert moves[1].any()
    assert not torch.allclose(moves[1], moves[2], atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_extension_center_equals_the_cpus(dtype):
    x = (torch.randn(6, 5, 7, 9) + 3).to(dtype).contiguous(memory_format=torch.channels_last)
    with pyfeedback.backend("extension"):
        ours = torch.ops.pyfeedback.center(x.cuda(), 4)
    assert ours.stride() == x[:4].stride()
    assert largest_error([ours.cpu()], [torch.ops.pyfeedback.center(x.double(), 4)]) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rule", ["fa", "wm", "ia", "aa", "kp"])
def test_training_step_is_captured_in_a_cuda_graph(rule):
    layer = pyfeedback.nn.Conv2d(8, 16, 3, bias=False, rule=rule, device="cuda")
    x = torch.randn(4, 8, 10, 10, device="cuda", requires_grad=True)
    captured = torch.cuda.make_graphed_callables(layer, (x,))
    expected = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    found = torch.autograd.grad(captured(x).square().sum(), [x, layer.weight])
    assert largest_error(list(found), list(expected)) < 1e-5
