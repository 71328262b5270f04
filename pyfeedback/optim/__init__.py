"""Optimizers: of the feedback weights beside one of torch.optim, or of a whole model at once.

Where a rule reads no activations (sa, kp) its gradient is made of W, the gradient of W, and B: the optimizer computes
it and autograd does no work. W and B of a layer are stepped together, and what both read is read from memory once.
"""

from pyfeedback.optim.adamw import AdamW
from pyfeedback.optim.sgd import SGD, FeedbackSGD

__all__ = ["SGD", "AdamW", "FeedbackSGD"]
