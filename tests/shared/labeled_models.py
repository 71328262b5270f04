"""What the tests with the Trainer of transformers share."""

import torch
from torch import nn
from torch.nn import functional as F


class Labeled(nn.Module):
    """The interface that the Trainer expects: a loss from keyword arguments."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, labels):
        return {"loss": F.cross_entropy(self.model(x), labels)}


def in_order(transformers):
    """The class of a Trainer that reads its rows in their order."""

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def rows_of(inputs, labels):
    """The rows of a data set, as the Trainer expects them."""
    return [{"x": x, "labels": label} for x, label in zip(inputs, labels, strict=True)]
