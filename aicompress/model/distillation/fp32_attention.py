"""Attention for training under bfloat16 autocast on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "aicompress_sdpa_float32"


def attend_in_float32(model: nn.Module) -> None:
    """Let a transformers model compute its attention core in float32, whatever autocast says; others stay as they are.

    With torch 2.13 on the CPU the backward pass of bfloat16 attention takes seven times as long as the float32 one, and
    more than all matrix products of a small encoder together.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """transformers' scaled-dot-product attention with float32 inputs."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    with torch.autocast(query.device.type, enabled=False):
        output, weights = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
    return output.to(query.dtype), weights
