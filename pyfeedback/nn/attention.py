"""Multi-head attention with feedback paths through its projections; attention itself learns by backprop."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pyfeedback.core.geometry import LINEAR
from pyfeedback.init import Init
from pyfeedback.nn import masks
from pyfeedback.nn.layer import FeedbackLayer, traced_call
from pyfeedback.nn.linear import Linear
from pyfeedback.rules import Rule


class OutProjection(Linear, NonDynamicallyQuantizableLinear):
    """The output projection of an attention layer: a :class:`Linear`, for which torch.nn has a separate class."""


class MultiheadAttention(FeedbackLayer, torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with feedback paths through its four projections.

    ``feedback`` [3E, E] belongs to the query, key and value projections, in the layout of ``in_proj_weight``;
    ``out_proj.feedback`` [E, E] belongs to the output projection. A rule's n is the batch size, whether or not
    ``batch_first`` is set.

    Args:
        rule, init: as in :class:`Linear`.
        others: as in torch.nn.MultiheadAttention, except that ``kdim`` and ``vdim`` must equal ``embed_dim``.

    Shapes, masks and results are those of torch.nn. Nested tensors are not supported.

    Raises:
        ValueError: ``kdim`` or ``vdim`` differs from ``embed_dim``; in a call, torch.nn refuses a shape or device.
        TypeError: in a call, torch.nn refuses the dtype of a mask.
    """

    out_proj: OutProjection
    weight_name = "in_proj_weight"

    def __init__(
        self, *args, rule: str | Rule = "fa", init: Init | Callable[[Tensor], object] | None = None, **options
    ):
        super().__init__(*args, **options)
        if not self._qkv_same_embed_dim:
            raise ValueError(
                f"kdim is {self.kdim} and vdim {self.vdim}, expected embed_dim, {self.embed_dim}, for both"
            )
        self.out_proj.__class__ = OutProjection
        self.out_proj.attach_feedback(rule, init)
        self.attach_feedback(rule, init)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``in_proj_weight``, the weight that ``feedback`` belongs to."""
        return self.in_proj_weight

    @property
    def bias(self) -> Tensor | None:
        """``in_proj_bias``."""
        return self.in_proj_bias

    def reset_parameters(self) -> None:
        """Draw all weights, biases and feedback weights again."""
        self._reset_parameters()
        self.reset_feedback()
        self.out_proj.reset_feedback()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(query, Tensor):
            options = {"average_attn_weights": average_attn_weights, "is_causal": is_causal}
            return traced_call(self, (query, key, value, key_padding_mask, need_weights, attn_mask), options)
        self.called = True
        sizes = masks.check_inputs(query, key, value, self.embed_dim, self.batch_first)
        detached = {id(t): self.detach_input(t) for t in (query, key, value)}
        query, key, value = (detached[id(t)] for t in (query, key, value))
        if self.feedback is None and self.out_proj.feedback is None and self.out_proj.direct is None:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask is None, expected a mask with is_causal=True, which is only a hint")
        causal = is_causal and key_padding_mask is None and not need_weights  # then torch uses it and ignores the mask
        masks.check_masks(attn_mask, key_padding_mask, query, sizes, self.num_heads, need_weights, causal)
        q, k, v = self._project(query, key, value)
        mask = None if causal else masks.merged(attn_mask, key_padding_mask, sizes, self.num_heads, query.dtype)
        k, v, mask = self._extended(k, v, mask)
        q, k, v = (t.view(*t.shape[:-1], self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            scores = scores if mask is None else scores + mask.to(scores.dtype)
            weights = F.dropout(torch.softmax(scores, -1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not sizes.batched:
            return output.squeeze(0), weights if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Compute queries, keys and values, batch first; in one product if all three inputs are the same tensor.

        Each projection follows the rule as a separate layer. One product gives the same result unless null is nonzero,
        which a schedule may change.
        """
        separate = self.rule.null != 0 or self.scheduled is not None
        parts = 1 if key is query and value is query and not separate else 3
        inputs = (query, key, value)[:parts]
        if query.dim() == 2:
            inputs = tuple(t.unsqueeze(0) for t in inputs)
        elif not self.batch_first:
            inputs = tuple(t.transpose(0, 1) for t in inputs)
        stacked = (self.weight, self.effective_feedback(), self.bias)
        of_each = (t.chunk(parts) if t is not None else (None,) * parts for t in stacked)
        projected = [self._run(*each) for each in zip(inputs, *of_each, strict=True)]
        return list(projected[0].chunk(3, -1)) if parts == 1 else projected

    def _run(self, input: Tensor, weight: Tensor, feedback: Tensor | None, bias: Tensor | None) -> Tensor:
        if feedback is None:
            return F.linear(input, weight, bias)
        return self.run(LINEAR, input, weight, feedback, bias)

    def _extended(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the keys and values of ``add_bias_kv`` and ``add_zero_attn``, which are never masked."""
        tails = [(self.bias_k, self.bias_v)] if self.bias_k is not None and self.bias_v is not None else []
        tails += [(k.new_zeros(1, 1, self.embed_dim),) * 2] if self.add_zero_attn else []
        for of_keys, of_values in tails:
            k, v = (torch.cat([t, e.to(t.dtype).expand(len(t), 1, -1)], 1) for t, e in ((k, of_keys), (v, of_values)))
        return k, v, mask if mask is None or not tails else F.pad(mask, (0, len(tails)))
