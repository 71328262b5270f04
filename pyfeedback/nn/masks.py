"""Checks of the inputs and masks of attention, as in torch.nn.MultiheadAttention, and the merging of its two masks."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyfeedback.core.values import refuse_non_tensor


class Sizes(NamedTuple):
    """Sizes of the inputs of attention: batch N, query length L, key length S."""

    batched: bool
    batch: int
    queries: int
    keys: int


def check_inputs(query: Tensor, key: Tensor, value: Tensor, embed_dim: int, batch_first: bool) -> Sizes:
    """Check the inputs and return their sizes.

    Raises:
        TypeError: an input is not a tensor.
        ValueError: the shapes of the inputs do not match.
    """
    layout = "[N, L, E]" if batch_first else "[L, N, E]"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            refuse_non_tensor(name, tensor)
    if query.dim() not in (2, 3):
        raise ValueError(f"query has {_shape(query)}, expected {layout} or [L, E]")
    if key.dim() != query.dim():
        raise ValueError(f"key has {_shape(key)}, expected rank {query.dim()}, that of query")
    if value.shape != key.shape:
        raise ValueError(f"value has shape {tuple(value.shape)}, expected that of key, {tuple(key.shape)}")
    for name, tensor in (("query", query), ("key", key)):
        if tensor.shape[-1] != embed_dim:
            features = f"{tensor.shape[-1]} features, shape {tuple(tensor.shape)}"
            raise ValueError(f"{name} has {features}, expected embed_dim, {embed_dim}")
    if query.dim() == 2:
        return Sizes(False, 1, len(query), len(key))
    batch, length = (0, 1) if batch_first else (1, 0)
    if key.shape[batch] != query.shape[batch]:
        raise ValueError(f"key has a batch of {key.shape[batch]}, expected that of query, {query.shape[batch]}")
    return Sizes(True, query.shape[batch], query.shape[length], key.shape[length])


def check_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    query: Tensor,
    sizes: Sizes,
    heads: int,
    need_weights: bool,
    causal: bool,
) -> None:
    """Raise for masks that torch refuses; ``causal`` means that ``is_causal`` is used in place of ``attn_mask``.

    Raises:
        TypeError: a mask is not a tensor, or its dtype is neither bool nor that of the computation.
        ValueError: a mask has the wrong shape or device.
    """
    autocast = query.device.type != "meta" and torch.is_autocast_enabled(query.device.type)
    for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is None:
            continue
        if not isinstance(mask, Tensor):
            refuse_non_tensor(name, mask)
        if mask.device != query.device:
            raise ValueError(f"{name} is on {mask.device}, expected the device of query, {query.device}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{name} has dtype {mask.dtype}, expected {_dtypes(query.dtype)}")
        _check_shape(name, mask, sizes, heads, causal)
    given = {
        name: mask.dtype if mask.is_floating_point() else query.dtype  # boolean masks are converted to query's dtype
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask))
        if mask is not None and not causal
    }
    if given:
        _check_dtype(given, query.dtype, autocast, need_weights)


def _check_dtype(given: dict[str, torch.dtype], expected: torch.dtype, autocast: bool, need_weights: bool) -> None:
    """Raise for masks whose sum torch does not add to products of dtype ``expected``.

    Autocast casts all dtypes but float64; scaled_dot_product_attention accepts a float32 mask for inputs of any dtype.
    """
    (name, dtype), *others = given.items()
    for _, other in others:
        dtype = torch.promote_types(dtype, other)
    accepted = dtype == expected or (autocast and dtype != torch.float64)
    if not accepted and (need_weights or dtype != torch.float32):
        name = name if given[name] == dtype else others[0][0]
        raise TypeError(f"{name} has dtype {given[name]}, expected {_dtypes(expected)}")


def merged(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, sizes: Sizes, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Merge the masks into an additive one that broadcasts to [N, heads, L, S]; in boolean masks, True masks out."""
    total: Tensor | None = None
    for mask, is_padding in ((attn_mask, False), (key_padding_mask, True)):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
        if is_padding:
            mask = mask.reshape(sizes.batch, 1, 1, sizes.keys)
        elif mask.dim() == 3:
            mask = mask.unflatten(0, (sizes.batch, heads))
        total = mask if total is None else total + mask
    return total


def _check_shape(name: str, mask: Tensor, sizes: Sizes, heads: int, causal: bool) -> None:
    batched, batch, queries, keys = sizes
    expected: tuple[int, ...]
    if name == "key_padding_mask":
        layout, expected = ("[N, S]", (batch, keys)) if batched else ("[S]", (keys,))
    elif mask.dim() == 2:
        layout, expected = "[L, S]", (queries, keys)
    elif mask.dim() == 3:
        layout, expected = ("[N * heads, L, S]" if batched else "[heads, L, S]"), (batch * heads, queries, keys)
    else:
        raise ValueError(f"attn_mask has {_shape(mask)}, expected [L, S] or [N * heads, L, S]")
    read = not causal or (mask.dim() == 3 and not batched)
    if read and tuple(mask.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, expected {expected}, {layout}")


def _dtypes(of_query: torch.dtype) -> str:
    return f"torch.bool or that of query, {of_query}"


def _shape(tensor: Tensor) -> str:
    return f"rank {tensor.dim()}, shape {tuple(tensor.shape)}"
