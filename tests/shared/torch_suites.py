"""PyTorch's own lists of modules, operators and optimizers with their sample inputs.

They are part of `torch.testing._internal`, which PyTorch's test suite uses. Importing it disables assignments to
`torch.backends` in the whole process. This module undoes that for the other tests.
"""

from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

with mock.patch("torch.backends.disable_global_flags"):
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import FunctionInput, module_db
    from torch.testing._internal.common_optimizers import optim_db

__all__ = ["FunctionInput", "assert_same", "copied", "module_db", "op_db", "optim_db", "tensors_of"]


def copied(tree):
    """The same structure with a new leaf for every tensor."""
    return tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), tree)


def tensors_of(tree) -> list[Tensor]:
    """The tensors among the leaves of a structure."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def assert_same(found, expected) -> None:
    """Bitwise equal values, equal dtypes and strides; nan equals nan and None equals None."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, check_stride=True)
