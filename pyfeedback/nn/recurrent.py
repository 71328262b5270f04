"""The recurrent functions of PyTorch, step by step, so that each of their products is one of its own.

PyTorch computes all steps in one call, which has no place for a feedback weight. Each function here has the arguments
and results of that of torch, after ``product``, which is called as ``F.linear(input, weight, bias)``. It gets the
number of ``steps`` if a forward pass calls it once for each step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfeedback.core.uses import RECURRENT

State = tuple[Tensor, ...]  # (hidden,), or (hidden, cell) of an LSTM
Product = Callable[..., Tensor]


def _rnn(activation: Callable[[Tensor], Tensor], of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    return (activation(of_input + of_hidden),)


def _lstm(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    i, f, g, o = (of_input + of_hidden).chunk(4, -1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    (r, z, n), (hidden_r, hidden_z, hidden_n) = of_input.chunk(3, -1), of_hidden.chunk(3, -1)
    new = torch.tanh(n + torch.sigmoid(r + hidden_r) * hidden_n)
    return (new + torch.sigmoid(z + hidden_z) * (state[0] - new),)


_CELLS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "rnn_tanh": partial(_rnn, torch.tanh),
    "rnn_relu": partial(_rnn, torch.relu),
    "lstm": _lstm,
    "gru": _gru,
}


def _cell(name: str, product: Product, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih=None, b_hh=None):
    """torch.lstm_cell and its like: one step."""
    state = tuple(hx) if name == "lstm" else (hx,)
    state = _CELLS[name](product(input, w_ih, b_ih), product(state[0], w_hh, b_hh), state)
    return state if name == "lstm" else state[0]


def _network(name: str, product: Product, input: Tensor, *others):
    """torch.lstm and its like: all layers and steps, of a padded batch or, with batch sizes, of a packed one."""
    sizes: list[int] | None = None
    if isinstance(others[0], Tensor) and not others[0].is_floating_point():
        sizes, others = others[0].tolist(), (*others[1:], False)
    hx, params, has_biases, layers, dropout, train, bidirectional, batch_first = others
    hidden = tuple(hx) if name == "lstm" else (hx,)
    projects = len(hidden) == 2 and hidden[0].shape[-1] != hidden[1].shape[-1]
    count, directions = 2 + 2 * has_biases + projects, 1 + bidirectional
    x, last = input.transpose(0, 1) if batch_first else input, []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            w_ih, w_hh, *rest = params[place * count : (place + 1) * count]
            b_ih, b_hh = rest[:2] if has_biases else (None, None)
            weights = w_ih, w_hh, b_ih, b_hh, rest[-1] if projects else None
            state = tuple(h[place] for h in hidden)
            output, state = _direction(name, product, x, sizes, state, weights, direction == 1)
            outputs.append(output)
            last.append(state)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and layer < layers - 1:
            x = F.dropout(x, dropout, train)
    return x.transpose(0, 1) if batch_first else x, *(torch.stack(each) for each in zip(*last, strict=True))


def _direction(
    name: str, product: Product, x: Tensor, sizes: list[int] | None, state: State, weights: tuple, is_reverse: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: x is [T, N, C], or [the sum of sizes, C] for a packed batch."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    of_input: Sequence[Tensor]
    if sizes is None:  # the steps are positions of one product, whose samples are dimension 0
        of_input = product(x.transpose(0, 1), w_ih, b_ih).unbind(1)
        sizes = [x.shape[1]] * len(of_input)
    else:
        of_input = [product(part, w_ih, b_ih, steps=len(sizes)) for part in x.split(sizes)]
    steps = range(len(sizes))
    outputs: list[Tensor] = []
    for t in reversed(steps) if is_reverse else steps:
        running, waiting = (tuple(part) for part in zip(*(s.tensor_split((sizes[t],)) for s in state), strict=True))
        running = _CELLS[name](of_input[t], product(running[0], w_hh, b_hh, steps=len(sizes)), running)
        if w_hr is not None:
            running = product(running[0], w_hr, None, steps=len(sizes)), running[1]
        outputs.append(running[0])
        state = tuple(torch.cat(pair) if len(pair[1]) else pair[0] for pair in zip(running, waiting, strict=True))
    outputs = outputs[::-1] if is_reverse else outputs
    return torch.stack(outputs) if x.dim() == 3 else torch.cat(outputs), state


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: partial(_network, name) for name in RECURRENT},
    **{f"{name}_cell": partial(_cell, name) for name in RECURRENT},
}
