"""The small networks that the tests train and convert, and batches for them.

The networks are plain torch.nn modules, which a test converts by the rule under test. Each function that builds one
seeds torch's global generator. All networks except :func:`perceptron` take images [N, 2, side, side].
"""

import itertools
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import pyfeedback

# The coefficients are large enough for every term to matter, and training is stable.
RULES = {
    "bp": pyfeedback.rule("bp"),
    "fa": pyfeedback.rule("fa"),
    "wm": pyfeedback.rule("wm", amp=0.05, decay=0.1),
    "ia": pyfeedback.rule("ia", amp=0.05, null=0.02, decay=0.1),
    "sa": pyfeedback.rule("sa", self_=0.2, decay=0.3),
    "aa": pyfeedback.rule("aa", amp=0.05, sparse=0.05),
    "kp": pyfeedback.rule("kp", decay=0.1),
}


def perceptron(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes with tanh in between: "0", "2", "4", ..."""
    torch.manual_seed(0)
    layers = [nn.Linear(before, after) for before, after in itertools.pairwise(sizes)]
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh())))[:-1]


def convnet(channels: int = 4, side: int = 4, hidden: int = 5) -> nn.Sequential:
    """A 3x3 convolution, "0", and linear layers, "3" and "5", with tanh in between. Three outputs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, channels, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(channels * (side - 2) ** 2, hidden), nn.Tanh(), nn.Linear(hidden, 3),
    )  # fmt: skip


def pointwise_convnet() -> nn.Sequential:
    """A 3x3 convolution without bias, "0", a 1x1 convolution, "2", and a linear layer, "4". Side 4, four outputs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(96, 4)
    )


def normalized_convnet() -> nn.Sequential:
    """A convolution without bias, "0", batch norm, and linear layers, "4" and "5". Side 4, three outputs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3)
    )


def regression(seed: int = 1, count: int = 6, side: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Images [count, 2, side, side] and targets [count, 3], determined by the seed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (count, 2, side, side), (count, 3)
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]


def classification(seed: int = 0, count: int = 8, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Images [count, 2, 4, 4] and labels [count], determined by the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 4, 4, generator=generator), torch.randint(classes, (count,), generator=generator)


# Ways to compute a weight from other parameters.
COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm hook": nn.utils.weight_norm,
    "spectral_norm hook": nn.utils.spectral_norm,
    "prune": partial(prune.random_unstructured, name="weight", amount=0.4),
}
