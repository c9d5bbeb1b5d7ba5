"""The forward pass of a whole encoder layer in one function, where nothing more is asked of the layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook


class JoinedLayer(ABC):
    """Stands for a layer's forward: calls of modules take as long as small products.

    It does what the layer's own forward does with these modules. That one runs where more is asked for: hooks inside of
    the layer, another attention, a cache, cross attention, other modules than were joined.

    Args:
        layer: BERT's, with modules that can be joined.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.parts = _parts(layer)
        self.inside = [module for module in layer.modules() if module is not layer]
        self.hooks = self._hooks()

    def __call__(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *more: Any, **options: Any) -> Any:
        """(batch, tokens, width) -> the same, in the dtype of the residual stream."""
        layer = self.layer
        if hidden_states.requires_grad or any(value is not None for value in more) or not self._is_plain(options):
            return type(layer).forward(layer, hidden_states, attention_mask, *more, **options)
        return self.compute(hidden_states, attention_mask)

    @abstractmethod
    def compute(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The layer's outputs; a mask is added to the attention's scores, or says which of them count."""

    def _is_plain(self, options: dict[str, Any]) -> bool:
        """Whether nothing is asked for but the outputs, and the layer is as it was joined."""
        return (
            all(options.get(name) is None for name in _MORE)
            and self.parts[0].config._attn_implementation == "sdpa"
            and not (self.layer.training or self.layer.chunk_size_feed_forward)
            and self.parts == _parts(self.layer)
            and self.hooks == self._hooks()
            and not _has_any_global_hook()  # type: ignore[no-untyped-call]
        )

    def _hooks(self) -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in self.inside)


# What may be asked of a layer beyond its outputs for its inputs.
_MORE = ("encoder_hidden_states", "past_key_values", "output_attentions", "position_bias", "cache", "is_causal")


def _parts(layer: Any) -> tuple[Any, ...]:
    """The modules of a layer that compute, its attention first."""
    inner, feed = layer.attention.self, layer.intermediate
    return (
        *(inner, inner.query, inner.key, inner.value, layer.attention.output),
        *(feed.intermediate_act_fn, feed.dense, layer.output),
    )


def mixed_heads(attention: Any, heads: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of a product that holds query, key and value: (batch, tokens, 3 x width) -> (rows, width)."""
    parts = heads.view(*heads.shape[:-1], 3, -1, attention.attention_head_size)
    query, key, value = parts.transpose(1, 3).unbind(2)  # (batch, heads, tokens, width of a head) each
    mixed = F.scaled_dot_product_attention(query, key, value, mask, scale=attention.scaling)
    return mixed.transpose(1, 2).reshape(heads.shape[0] * heads.shape[1], -1)
