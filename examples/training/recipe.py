"""Optimizers, and the learning rate over time."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

import pyfeedback
from training.settings import Settings


def rate(settings: Settings, epoch: float) -> float:
    """The factor of the learning rate after ``epoch`` epochs."""
    if epoch < settings.warmup:
        return epoch / settings.warmup
    if settings.cosine:
        return (1 + math.cos(math.pi * (epoch - settings.warmup) / (settings.epochs - settings.warmup))) / 2
    return 0.1 ** sum(epoch >= milestone for milestone in settings.milestones)


def optimizers(settings: Settings, model: nn.Module) -> list[Optimizer]:
    """One optimizer for all parameters of ``model``, or one for the weights and one for the feedback.

    The first follows the schedule. If the feedback has no separate learning rate, it uses the options of the weights,
    as Kolen-Pollack requires.
    """
    forward = [p for p in pyfeedback.forward_parameters(model) if p.requires_grad]
    feedback = [p for p in pyfeedback.feedback_parameters(model) if p.requires_grad]
    # Rules that read probes have no gradient from autograd.
    by_probes = any(layer.rule.reads_probes for _, layer in pyfeedback.feedback_layers(model))
    if not feedback and not by_probes:
        return [_optimizer(settings, forward)]
    if settings.feedback_lr is not None:
        lr, momentum = settings.feedback_lr, settings.feedback_momentum
        own = pyfeedback.optim.FeedbackSGD(model, lr, momentum, noise=settings.noise)
        return [_optimizer(settings, forward), own]
    if settings.optimizer == "sgd":
        options = settings.lr, settings.momentum, settings.weight_decay, settings.nesterov
        return [pyfeedback.optim.SGD(model, *options, noise=settings.noise)]
    if settings.optimizer == "adamw":
        return [pyfeedback.optim.AdamW(model, settings.lr, weight_decay=settings.weight_decay)]
    adam = _optimizer(settings, forward)
    adam.add_param_group({"params": feedback, "weight_decay": 0.0})  # the gradient of the rule includes the decay
    return [adam]


def step(optimizers: list[Optimizer], lr: float) -> None:
    """Step all optimizers, the first with this learning rate, and clear the gradients."""
    for group in optimizers[0].param_groups:
        group["lr"] = lr
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()


def _optimizer(settings: Settings, parameters: Iterable[nn.Parameter]) -> Optimizer:
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, nesterov=settings.nesterov, **common)
    return (torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW)(parameters, **common)
