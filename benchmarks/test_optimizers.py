"""A step of all tensors of ResNet-50 (W, B and batch norm) against torch.optim with a separate update of the feedback.

`foreach` is torch.optim(foreach=True) for the forward parameters. For B it is the code a user would write with
torch._foreach: the gradient of the rule, then an SGD update by hand or a second torch.optim.AdamW. `fused` is
torch.optim(fused=True) for both, on the same gradient. `FeedbackSGD` is torch.optim.SGD(foreach=True) and pyfeedback's
optimizer of B.
"""

import copy

import pytest
import torch
from implementations import SUBJECT
from selection import DTYPES, RULES
from timing import Step
from torch import nn

import pyfeedback
from pyfeedback.testing import RESNET50

SGD = {"lr": 1e-2, "momentum": 0.9, "nesterov": True}
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999)}
WEIGHT_DECAY = 1e-4


@pytest.mark.parametrize("update_rule", ["kp", "sa", "ia"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_optimizer_step(race, selection, optimizer, update_rule, dtype_name):
    rule, ways = RULES[update_rule], WAYS[optimizer]
    check(ways, tensors_of(RESNET50[:3], rule), rule)
    model = with_gradients(tensors_of(RESNET50, rule).to(selection.device, DTYPES[dtype_name]))
    race(
        "optimizer",
        {name: Step(make(model, rule)) for name, make in ways.items()},
        hide_launches=False,
        group=f"{optimizer} {dtype_name}",
        optimizer=optimizer,
        rule=update_rule,
        dtype=dtype_name,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def tensors_of(convolutions, rule):
    """The convolutions, batch norms and classifier in a Sequential that is never called."""
    torch.manual_seed(0)
    layers = [
        layer
        for s in convolutions
        for _ in range(s.repeats)
        for layer in (nn.Conv2d(s.in_channels, s.out_channels, s.kernel, bias=False), nn.BatchNorm2d(s.out_channels))
    ]
    return pyfeedback.convert(nn.Sequential(*layers, nn.Linear(2048, 1000)), rule)


def with_gradients(model):
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)
    return model


def ours(make, model, **options):
    return make(model, weight_decay=WEIGHT_DECAY, **options).step


def theirs(make, model, rule, **options):
    """torch.optim for W, and torch.optim for B on a gradient computed by torch._foreach calls."""
    step_forward = forward_step(make, model, **options)
    tied_decay = rule.decay if make is torch.optim.AdamW and rule.tie else 0.0  # as pyfeedback.optim.AdamW
    step_feedback = make(pyfeedback.feedback_parameters(model), weight_decay=tied_decay, **options).step

    def step():
        feedback, gradient = rule_gradients(model, rule, 0.0 if tied_decay else rule.decay)
        step_forward()
        before = [b.grad for b in feedback]
        for b, g in zip(feedback, gradient, strict=True):
            b.grad = g
        step_feedback()
        for b, g in zip(feedback, before, strict=True):
            b.grad = g

    return step


def by_hand(model, rule):
    """torch.optim.SGD for W, and SGD written out for B."""
    step_forward = forward_step(torch.optim.SGD, model, foreach=True, **SGD)
    buffers = [torch.zeros_like(b) for b in pyfeedback.feedback_parameters(model)]
    lr, momentum = SGD["lr"], SGD["momentum"]

    @torch.no_grad()
    def step():
        feedback, gradient = rule_gradients(model, rule, rule.decay)
        step_forward()
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradient)
        direction = torch._foreach_add(gradient, buffers, alpha=momentum)
        torch._foreach_add_(feedback, direction, alpha=-lr)

    return step


def with_feedback_sgd(model, rule):
    step_forward = forward_step(torch.optim.SGD, model, foreach=True, **SGD)
    feedback = pyfeedback.optim.FeedbackSGD(model, **SGD)
    return lambda: (feedback.step(), step_forward())


def forward_step(make, model, **options):
    return make(pyfeedback.forward_parameters(model), weight_decay=WEIGHT_DECAY, **options).step


@torch.no_grad()
def rule_gradients(model, rule, decay):
    """The feedback weights and their gradients, by the smallest number of torch._foreach calls for the rule."""
    layers = [layer for _, layer in pyfeedback.feedback_layers(model)]
    feedback, weight = [layer.feedback for layer in layers], [layer.weight for layer in layers]
    if rule.reads_data:
        return feedback, [b.grad for b in feedback]
    if rule.tie:
        gradient = [w.grad for w in weight]
        return feedback, torch._foreach_add(gradient, feedback, alpha=decay) if decay else gradient
    gradient = torch._foreach_mul(feedback, decay)
    torch._foreach_add_(gradient, weight, alpha=-rule.self_)
    return feedback, gradient


WAYS = {
    "SGD": {
        SUBJECT: lambda model, rule: ours(pyfeedback.optim.SGD, model, **SGD),
        "FeedbackSGD": with_feedback_sgd,
        "foreach": by_hand,
        "fused": lambda model, rule: theirs(torch.optim.SGD, model, rule, fused=True, **SGD),
    },
    "AdamW": {
        SUBJECT: lambda model, rule: ours(pyfeedback.optim.AdamW, model, **ADAMW),
        "foreach": lambda model, rule: theirs(torch.optim.AdamW, model, rule, foreach=True, **ADAMW),
        "fused": lambda model, rule: theirs(torch.optim.AdamW, model, rule, fused=True, **ADAMW),
    },
}


def check(ways, model, rule):
    """Compare two steps of each implementation with the last one in float64."""
    expected = [p.float() for p in stepped(list(ways.values())[-1], copy.deepcopy(model).double(), rule)]
    for make in ways.values():
        torch.testing.assert_close(stepped(make, copy.deepcopy(model), rule), expected, rtol=1e-5, atol=1e-6)


def stepped(make, model, rule):
    step = make(with_gradients(model), rule)
    step(), step()
    return [p.detach() for p in model.parameters()]
