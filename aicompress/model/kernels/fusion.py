"""Fuse neighbouring layers of an encoder; on the bfloat16 kernel, values between them stay in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aicompress.model.kernels.joined_layer import JoinedLayer, mixed_heads
from aicompress.model.kernels.linear import Bfloat16Linear
from aicompress.model.kernels.prepacked import Prepacked
from aicompress.model.kernels.w4a8_layer import W4A8Layer, can_join

# Encoders whose layers are built as BERT's: attention.self, attention.output, intermediate, output.
LIKE_BERT = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "electra"})


def fuse(model: Any) -> None:
    """Join layers that run on the bfloat16 kernel or on integer products, in place; others are left alone.

    On the bfloat16 kernel, GELU and the addition of the residual are computed inside the products before them, on
    float32 sums; attention runs in bfloat16. What a block gives, normalisation weights and all outputs of the model
    keep their dtype.
    """
    if model.config.model_type not in LIKE_BERT:
        return
    for layer in [module for module in model.modules() if hasattr(module, "intermediate")]:
        if can_join(layer):
            layer.forward = W4A8Layer(layer)
            continue
        forward, attention = _join_feed_forward(layer), _join_attention(layer.attention)
        if forward and attention and not hasattr(layer, "crossattention"):
            wide = layer.output.LayerNorm.weight.dtype
            layer.attention.output = ResidualNorm(layer.attention.output, torch.bfloat16)
            layer.output = ResidualNorm(layer.output, wide)
            layer.attention.register_forward_pre_hook(_narrow)
            if not layer.is_decoder and _have_biases_alike(layer.attention.self):
                layer.forward = Bfloat16Layer(layer)


class Bfloat16Layer(JoinedLayer):
    """A layer on the bfloat16 kernel, its parts joined."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        _, *heads = self.parts[:4]
        # Query, key and value as one product: oneDNN shares a wide one out among threads, and not a narrow one.
        matrix = torch.cat([part.packed.dense() for part in heads])
        biases = [part.small_bias for part in heads]
        self.packed = Prepacked(matrix)
        self.bias = None if any(bias is None for bias in biases) else torch.cat(biases)

    def compute(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        attention, _, _, _, mixer, activation, first, last = self.parts
        rows = hidden_states.flatten(0, -2).bfloat16()
        heads: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed.tensor, self.bias, "none", [], "none")
        rows = mixer.rows(mixed_heads(attention, heads.view(*hidden_states.shape[:-1], -1), attention_mask), rows)
        hidden: Tensor = last.rows(activation(first.multiply(rows)), rows)
        return hidden.view(hidden_states.shape)


def _have_biases_alike(attention: Any) -> bool:
    """Whether query, key and value all have a bias, or none of them."""
    return len({part.small_bias is None for part in (attention.query, attention.key, attention.value)}) == 1


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
        return self.rows(hidden.flatten(0, -2), residual.flatten(0, -2)).view(residual.shape)

    def rows(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """(rows, in) and (rows, out), both bfloat16 -> (rows, out)."""
        norm, dense = self.LayerNorm, self.dense
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            hidden, residual, dense.packed.tensor, dense.small_bias, "add"
        )
        # PyTorch normalises bfloat16 by bfloat16 or float32 numbers, and not by float16 ones.
        weight, bias = (each.float() if each.dtype is torch.float16 else each for each in (norm.weight, norm.bias))
        return F.layer_norm(y, norm.normalized_shape, weight, bias, norm.eps).to(self.dtype)


def _narrow(attention: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What attention is given, in bfloat16: hidden states, which it reads four times, and a mask that is added."""
    hidden, *rest = args
    if rest and isinstance(rest[0], Tensor) and rest[0].is_floating_point():
        rest[0] = rest[0].clamp(min=torch.finfo(torch.bfloat16).min).bfloat16()
    return (hidden.bfloat16(), *rest)


def _join_feed_forward(layer: Any) -> bool:
    """Whether the layers of a feed-forward part are on the kernel; their activation then moves into the product."""
    first, last, activation = layer.intermediate.dense, layer.output.dense, layer.intermediate.intermediate_act_fn
    if not (isinstance(first, Bfloat16Linear) and isinstance(last, Bfloat16Linear)):
        return False
    if getattr(activation, "act", None) is F.gelu:  # the exact one, not its approximations
        first.activation, first.output, last.output = "gelu", torch.bfloat16, _wide(layer)
        first.few, first.kernel = None, Bfloat16Linear.kernel  # the product in float32 has no activation
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
