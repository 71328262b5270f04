"""LSTM, GRU, RNN and their cells: every product goes through a feedback weight."""

import copy
import itertools

import layer_cases
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import pyfeedback
from pyfeedback import reference

KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "relu": lambda *a, **o: nn.RNN(*a, nonlinearity="relu", **o),
}
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False, "batch_first": True},
    "deep": {"num_layers": 3, "bidirectional": True},
    "projection": {"num_layers": 2, "bidirectional": True, "proj_size": 2},
}
CASES = [(k, o) for k in KINDS for o in OPTIONS if k == "lstm" or o != "projection"]
C, H, T, N = 3, 4, 5, 2


def network(kind, options=None, rule="fa"):
    torch.manual_seed(0)
    plain = KINDS[kind](C, H, **(options or {})).double()
    model = pyfeedback.convert(copy.deepcopy(plain), rule)
    return plain, model, dict(pyfeedback.feedback_layers(model))


def sequences(options, form):
    if form == "packed":
        return pack_sequence([torch.randn(n, C, dtype=torch.float64) for n in (3, T, 1)], enforce_sorted=False)
    if form == "unbatched":
        return torch.randn(T, C, dtype=torch.float64)
    return torch.randn(*((N, T) if options.get("batch_first") else (T, N)), C, dtype=torch.float64)


def flat(output):
    """Every tensor of an output."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    return [t for part in output if part is not None for t in flat(part)]


def leaf(x):
    if isinstance(x, torch.Tensor):
        return x.clone().requires_grad_(), None
    data = x.data.clone().requires_grad_()
    return x._replace(data=data), data


@pytest.mark.parametrize("form", ["padded", "packed", "unbatched"])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_with_the_weights_as_feedback_all_gradients_are_those_of_torch(kind, options, form):
    plain, model, layers = network(kind, OPTIONS[options])
    assert len(layers) == sum(p.dim() > 1 for p in plain.parameters())
    for layer in layers.values():
        layer.feedback.data.copy_(layer.weight)
    x = sequences(OPTIONS[options], form)
    found = {}
    for name, module in (("ours", model), ("torch", plain)):
        input, data = leaf(x)
        outputs = flat(module(input))
        sum((o * layer_cases.output_gradient(o)).sum() for o in outputs).backward()
        grads = [p.grad for key, p in module.named_parameters() if "feedback" not in key]
        found[name] = [*outputs, (input if data is None else data).grad, *grads]
    torch.testing.assert_close(found["ours"], found["torch"])


def step(kind, of_input, of_hidden, state):
    """One step, written like the formulas in the documentation of torch."""
    if kind in ("rnn", "relu"):
        return ((torch.tanh if kind == "rnn" else torch.relu)(of_input + of_hidden),)
    if kind == "gru":
        xs, hs = of_input.split(H, -1), of_hidden.split(H, -1)
        r, z = torch.sigmoid(xs[0] + hs[0]), torch.sigmoid(xs[1] + hs[1])
        return ((1 - z) * torch.tanh(xs[2] + r * hs[2]) + z * state[0],)
    i, f, g, o = (of_input + of_hidden).split(H, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def by_reference(kind, model, feedback, x, state):
    """Output, last state and all hidden states of a layer, with B in the backward pass of each product."""
    of_input, of_hidden = feedback["weight_ih_l0"], feedback["weight_hh_l0"]
    outputs, hidden = [], []
    for now in x:
        hidden.append(state[0])
        from_x = reference.linear(now, model.weight_ih_l0, of_input, model.bias_ih_l0)[0]
        from_h = reference.linear(state[0], model.weight_hh_l0, of_hidden, model.bias_hh_l0)[0]
        state = step(kind, from_x, from_h, state)
        outputs.append(state[0])
    return torch.stack(outputs), state, torch.stack(hidden, 1)


@pytest.mark.parametrize("rule", ["fa", "ia", "wm", "aa", "sa", "kp", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_reference(kind, rule):
    """The steps count like positions of one product: [N, T, C]."""
    rule = layer_cases.RULES[rule]
    plain, model, layers = network(kind, rule=rule)
    x = torch.randn(T, N, C, dtype=torch.float64)
    start = tuple(torch.randn(1, N, H, dtype=torch.float64) for _ in range(2 if kind == "lstm" else 1))
    ours = x.clone().requires_grad_()
    output, last = model(ours, start if kind == "lstm" else start[0])
    grad = layer_cases.output_gradient(output)
    ((output * grad).sum() + sum(h.sum() for h in last)).backward()

    feedback = {layer.weight_name: layer.feedback.detach().clone().requires_grad_() for layer in layers.values()}
    through = x.clone().requires_grad_()
    expected, state, hidden = by_reference(kind, plain, feedback, through, tuple(s[0] for s in start))
    torch.testing.assert_close(output, expected)
    ((expected * grad).sum() + sum(h.sum() for h in state)).backward()
    torch.testing.assert_close(ours.grad, through.grad)
    scale = 1 / T if rule.reduction == "mean" else 1.0
    for name, inputs in (("weight_ih_l0", x.transpose(0, 1)), ("weight_hh_l0", hidden.detach())):
        weight = plain.get_parameter(name)
        torch.testing.assert_close(model.get_parameter(name).grad, weight.grad)
        torch.testing.assert_close(
            model.get_parameter("bias" + name[6:]).grad, plain.get_parameter("bias" + name[6:]).grad
        )
        samples = {"samples": int(rule.samples * N)} if rule.samples else {}
        _, penalty = reference.linear(
            inputs, weight.detach(), feedback[name], decay=rule.decay, amp=rule.amp * scale, null=rule.null * scale,
            sparse=rule.sparse * scale, self_=rule.self_, center=rule.center, **samples,
        )  # fmt: skip
        total = rule.tie * weight.grad
        if penalty.requires_grad:
            total = total + torch.autograd.grad(penalty, feedback[name])[0]
        found = layers[f"{name}_feedback"].feedback.grad
        torch.testing.assert_close(torch.zeros_like(total) if found is None else found, total)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn", "relu"])
def test_cells(kind):
    torch.manual_seed(0)
    make = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell, "relu": nn.RNNCell}[kind]
    plain = make(C, H, **({"nonlinearity": "relu"} if kind == "relu" else {})).double()
    model = pyfeedback.convert(copy.deepcopy(plain), "fa")
    layers = {layer.weight_name: layer for _, layer in pyfeedback.feedback_layers(model)}
    assert list(layers) == ["weight_ih", "weight_hh"]
    x, *state = (torch.randn(N, size, dtype=torch.float64) for size in (C, H, H))
    state = state if kind == "lstm" else state[:1]
    ours, theirs = ([t.clone().requires_grad_() for t in (x, *state)] for _ in range(2))
    found = flat(model(ours[0], tuple(ours[1:]) if kind == "lstm" else ours[1]))
    products = [
        reference.linear(t, getattr(plain, f"weight_{n}"), layers[f"weight_{n}"].feedback, getattr(plain, f"bias_{n}"))[
            0
        ]
        for t, n in zip(theirs, ("ih", "hh"), strict=False)
    ]
    expected = step(kind, *products, tuple(theirs[1:]))
    torch.testing.assert_close(found, list(expected))
    sum(t.square().sum() for t in found).backward(), sum(t.square().sum() for t in expected).backward()
    torch.testing.assert_close([t.grad for t in ours], [t.grad for t in theirs])
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


def test_dropout_is_between_the_layers_in_training_only():
    plain, model, _ = network("gru", {"num_layers": 2, "dropout": 0.5})
    x = torch.randn(T, N, C, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    outputs = [model.train()(x)[0] for _ in range(2)]
    assert not torch.equal(*outputs)


def test_a_rule_without_units_moves_as_far_as_in_one_product():
    """The mean over the steps, so that tau does not depend on the length of the sequence."""
    found = []
    for steps in (1, 6):
        torch.manual_seed(0)
        model = pyfeedback.convert(nn.RNN(C, H).double(), pyfeedback.rule("sa", tau=4.0))
        x = torch.randn(steps, N, C, dtype=torch.float64)
        model(x)[0].sum().backward()
        found.append([p.grad for p in pyfeedback.feedback_parameters(model)])
    torch.testing.assert_close(*found)


def test_the_names_of_all_combinations_are_in_the_state_dict():
    for kind, options in itertools.product(KINDS, ("plain", "deep")):
        plain, model, layers = network(kind, OPTIONS[options])
        assert set(model.state_dict()) == {*plain.state_dict(), *(f"{name}.feedback" for name in layers)}
        model.load_state_dict(plain.state_dict())
        x = sequences(OPTIONS[options], "padded")
        torch.testing.assert_close(pyfeedback.unconvert(model)(x), plain(x))
        assert type(model) is type(plain)


def test_a_small_task_is_learned_as_by_backprop():
    """The sum of a sequence, with kp: B finds W."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(1, 16, batch_first=True), "out": nn.Linear(16, 1)})
    pyfeedback.convert(model, pyfeedback.rule("kp", decay=1e-2))
    optimizer = pyfeedback.optim.SGD(model, lr=0.2, momentum=0.9, weight_decay=1e-2)
    for _ in range(150):
        x = torch.rand(32, 6, 1) - 0.5
        loss = F.mse_loss(model["out"](model["lstm"](x)[0][:, -1]), x.sum(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(a.angle < 30 for a in pyfeedback.alignment(model).values())
