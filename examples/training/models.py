"""Networks by name, their feedback paths, and the baseline whose features never learn."""

import copy

import torch
import tuned
from image_networks import head, initialize, stages, stem
from torch import Tensor, nn

import pyfeedback

CIFAR_DEPTHS = (8, 20, 32, 44, 56, 110)


def cifar_resnet(depth: int, classes: int, channels: int = 3) -> nn.Sequential:
    """The residual network for small images: ``depth`` = 6n + 2 layers, 16, 32 and 64 channels.

    Source: He et al. 2016 (arXiv 1512.03385), section 4.2, shortcuts of option A.
    """
    network = nn.Sequential(stem(channels, 16), *stages(depth, 16), nn.Sequential(*head(64, classes)))
    initialize(network)
    return network


def build(name: str, classes: int, shape: torch.Size) -> nn.Module:
    """Build a network for images of ``shape`` [C, H, W].

    Raises:
        ValueError: if there is no network of this name, or it does not support such images.
    """
    channels, size, _ = shape
    if name in {f"resnet{depth}" for depth in CIFAR_DEPTHS}:
        return cifar_resnet(int(name.removeprefix("resnet")), classes, channels)
    if name == "demo":
        if (channels, classes) != (1, 10):
            raise ValueError(f"model is 'demo', expected another for {channels} channels and {classes} classes")
        return tuned.network(size)
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise ValueError(f"model is {name!r}, which needs torchvision: {str(error).splitlines()[0]}") from None
    if channels != 3:
        raise ValueError(f"model is {name!r}, expected one for {channels} channels: demo, or resnet8 to resnet110")
    try:
        return models.get_model(name, weights=None, num_classes=classes)
    except ValueError:
        raise ValueError(f"model is {name!r}, expected demo, resnet20 or a name of torchvision.models") from None


def convert(network: nn.Module, rule: pyfeedback.Rule | dict[str, pyfeedback.Rule], scale: float = 1.0) -> nn.Module:
    """Convert every layer except the first, which has no layer below it to send an error to."""
    first = next(m for m in network.modules() if type(m) in pyfeedback.nn.LAYERS)
    pyfeedback.convert(network, rule, init=pyfeedback.Init(scale=scale))
    if isinstance(first, pyfeedback.nn.FeedbackLayer):
        pyfeedback.unconvert(first)
    return network


def frozen_features(network: nn.Module) -> nn.Module:
    """A copy of ``network`` in which only the last linear layer learns: a baseline for the other layers.

    Raises:
        ValueError: if there is no linear layer.
    """
    twin = copy.deepcopy(network).requires_grad_(False)
    classifiers = [module for module in twin.modules() if isinstance(module, nn.Linear)]
    if not classifiers:
        raise ValueError("frozen is True, expected --no-frozen for a network without a linear layer")
    classifiers[-1].requires_grad_(True)
    return twin


def weight_norms(network: nn.Module) -> Tensor:
    """The norm of each weight with more than one dimension, without feedback weights."""
    return torch.stack(torch._foreach_norm([p.detach() for p in pyfeedback.forward_parameters(network) if p.dim() > 1]))
