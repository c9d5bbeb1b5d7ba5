"""Neighbouring bfloat16 layers of an encoder joined: what flows between them is not widened and narrowed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aicompress.model.modules import Bfloat16Linear

# Encoders whose layers are built as BERT's: attention.self, attention.output, intermediate, output.
LIKE_BERT = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "electra"})


def fuse(model: Any) -> None:
    """Join layers that run on the bfloat16 kernel, in place; other models and layers are left alone.

    GELU is computed inside the product before it, attention runs in bfloat16. The residual stream, normalisation and
    all outputs of the model keep their dtype.
    """
    if model.config.model_type not in LIKE_BERT:
        return
    for layer in [module for module in model.modules() if hasattr(module, "intermediate")]:
        _join_feed_forward(layer)
        _join_attention(layer.attention)


def _join_feed_forward(layer: Any) -> None:
    first, last, activation = layer.intermediate.dense, layer.output.dense, layer.intermediate.intermediate_act_fn
    if not (isinstance(first, Bfloat16Linear) and isinstance(last, Bfloat16Linear)):
        return
    if getattr(activation, "act", None) is nn.functional.gelu:  # the exact one, not its approximations
        first.activation, first.output, last.output = "gelu", torch.bfloat16, _wide(layer)
        layer.intermediate.intermediate_act_fn = nn.Identity()


def _join_attention(attention: Any) -> None:
    inner, last = attention.self, attention.output.dense
    parts = [inner.query, inner.key, inner.value]
    if all(isinstance(part, Bfloat16Linear) for part in (*parts, last)):
        for part in parts:
            part.output = torch.bfloat16
        last.output = _wide(attention)


def _wide(layer: Any) -> torch.dtype:
    """The dtype of the residual stream."""
    dtype: torch.dtype = layer.output.LayerNorm.weight.dtype
    return dtype
