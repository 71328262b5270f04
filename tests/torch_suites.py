"""PyTorch's own lists of modules, operators and optimizers with their sample inputs, as tests here use them.

They live in `torch.testing._internal`, where PyTorch's test suite takes them from. Its import forbids assignments to
`torch.backends` for the whole process, which is undone here: the other tests of the process are no part of that suite.
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
    """The same structure with a fresh leaf in the place of every tensor."""
    return tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), tree)


def tensors_of(tree) -> list[Tensor]:
    """The tensors among the leaves of a structure."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def assert_same(found, expected) -> None:
    """The same values bit by bit, dtypes and strides; nan is nan and None is None."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, check_stride=True)
