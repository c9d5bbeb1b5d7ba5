"""Neighbouring bfloat16 layers of an encoder joined: what flows between them is not widened and narrowed again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aicompress.model.modules import Bfloat16Linear

# Encoders whose layers are built as BERT's: attention.self, attention.output, intermediate, output.
LIKE_BERT = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "electra"})


def fuse(model: Any) -> None:
    """Join layers that run on the bfloat16 kernel, in place; other models and layers are left alone.

    GELU and the addition of the residual are computed inside the products before them, on float32 sums; attention runs
    in bfloat16. What a block gives, normalisation weights and all outputs of the model keep their dtype.
    """
    if model.config.model_type not in LIKE_BERT:
        return
    for layer in [module for module in model.modules() if hasattr(module, "intermediate")]:
        forward, attention = _join_feed_forward(layer), _join_attention(layer.attention)
        if forward and attention and not hasattr(layer, "crossattention"):
            wide = layer.output.LayerNorm.weight.dtype
            layer.attention.output = ResidualNorm(layer.attention.output, torch.bfloat16)
            layer.output = ResidualNorm(layer.output, wide)
            layer.attention.register_forward_pre_hook(_narrow)


class ResidualNorm(nn.Module):
    """LayerNorm(W x + b + residual): a product with the addition inside it, and the normalisation.

    Args:
        part: BERT's own module for this, with `dense` on the bfloat16 kernel.
        output: dtype of what it gives.
    """

    def __init__(self, part: Any, output: torch.dtype) -> None:
        super().__init__()
        self.dense, self.LayerNorm, self.dtype = part.dense, part.LayerNorm, output

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """(..., in) and (..., out), both bfloat16 -> (..., out)."""
        norm, dense = self.LayerNorm, self.dense
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            hidden.flatten(0, -2), residual.flatten(0, -2), dense.packed, dense.small_bias, "add"
        )
        y = F.layer_norm(y, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return y.to(self.dtype).view(residual.shape)


def _narrow(attention: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hidden states that attention is given, in bfloat16: it reads them four times."""
    return (args[0].bfloat16(), *args[1:])


def _join_feed_forward(layer: Any) -> bool:
    """Whether the layers of a feed-forward part are on the kernel; their activation then moves into the product."""
    first, last, activation = layer.intermediate.dense, layer.output.dense, layer.intermediate.intermediate_act_fn
    if not (isinstance(first, Bfloat16Linear) and isinstance(last, Bfloat16Linear)):
        return False
    if getattr(activation, "act", None) is F.gelu:  # the exact one, not its approximations
        first.activation, first.output, last.output = "gelu", torch.bfloat16, _wide(layer)
        layer.intermediate.intermediate_act_fn = nn.Identity()
    return True


def _join_attention(attention: Any) -> bool:
    """Whether all layers of an attention part are on the kernel; it then computes in bfloat16."""
    inner, last = attention.self, attention.output.dense
    parts = [inner.query, inner.key, inner.value]
    if not all(isinstance(part, Bfloat16Linear) for part in (*parts, last)):
        return False
    for part in parts:
        part.output = torch.bfloat16
    last.output = _wide(attention)
    return True


def _wide(layer: Any) -> torch.dtype:
    """The dtype of the residual stream."""
    dtype: torch.dtype = layer.output.LayerNorm.weight.dtype
    return dtype
