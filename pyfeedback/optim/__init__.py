"""Optimizers for the feedback weights alone, to use with an optimizer of torch.optim, or for a whole model.

The gradient of a rule that reads no activations (sa, kp) depends only on W, the gradient of W, and B. The optimizer
computes it, and autograd does no work for it. W and B of a layer are updated together, so that data which both updates
read is loaded from memory once. :func:`follow` makes any other optimizer step the feedback weights as well.
"""

from pyfeedback.optim.adamw import AdamW
from pyfeedback.optim.follower import Follower
from pyfeedback.optim.following import follow
from pyfeedback.optim.sgd import SGD, FeedbackSGD

__all__ = ["SGD", "AdamW", "FeedbackSGD", "Follower", "follow"]
