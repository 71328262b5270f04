"""Networks, losses and optimizers of the tests of pyfeedback.optim.follow."""

from functools import partial

import torch
from cases import largest_error
from small_networks import RULES, classification, normalized_convnet
from torch import nn

import pyfeedback

SEEN = {**RULES, **{name: pyfeedback.rule(name) for name in ("ia-probes", "aa-probes")}}
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "SGD fused": partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "Adam": partial(torch.optim.Adam, lr=0.05),
    "AdamW fused": partial(torch.optim.AdamW, lr=0.05, fused=True),
}


def network(rule, dtype=torch.float32):
    return pyfeedback.convert(normalized_convnet(), SEEN[rule]).to(dtype)


def loss(model, seed, part=slice(None)):
    x, target = classification(seed, 8, 3)
    return nn.functional.cross_entropy(model(x[part].to(next(model.parameters()).dtype)), target[part])


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def error(found, expected):
    assert found.keys() == expected.keys()
    return largest_error(list(found.values()), list(expected.values()))


def feedback(model):
    return [b.detach().clone() for b in pyfeedback.feedback_parameters(model)]


def are_equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
