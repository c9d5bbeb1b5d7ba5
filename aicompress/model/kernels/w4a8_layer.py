"""An encoder layer on compiled integer products: what lies between two of them is done as rows are rounded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aicompress.model.kernels.joined_layer import JoinedLayer, mixed_heads
from aicompress.model.kernels.w4a8 import Norm, PackedMatrix, W4A8Linear, normalize, rounded_rows


def can_join(layer: Any) -> bool:
    """Whether all products of a layer of BERT are integer ones, with exact GELU and LayerNorm between them."""
    if hasattr(layer, "crossattention") or layer.is_decoder:
        return False
    inner, first, last = layer.attention.self, layer.intermediate.dense, layer.output.dense
    products = [inner.query, inner.key, inner.value, layer.attention.output.dense, first, last]
    norms = [layer.attention.output.LayerNorm, layer.output.LayerNorm]
    return (
        all(isinstance(product, W4A8Linear) for product in products)
        and all(type(norm) is torch.nn.LayerNorm and norm.weight.dtype is torch.float32 for norm in norms)
        and all(norm.bias is not None for norm in norms)
        and getattr(layer.intermediate.intermediate_act_fn, "act", None) is F.gelu
    )


class W4A8Layer(JoinedLayer):
    """A layer of which every product has 4-bit weights and 8-bit inputs.

    Query, key and value are one product of inputs that are rounded once. GELU and the normalized sums with the residual
    stream are made by the threads that round them for the next product.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.heads = PackedMatrix.joined([part.packed for part in self.parts[1:4]])
        self.epsilons = [
            torch.tensor([part.LayerNorm.eps], dtype=torch.float32) for part in (self.parts[4], self.parts[7])
        ]

    def compute(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        attention, _, _, _, mixer, _, first, last = self.parts
        stream = hidden_states.flatten(0, -2).contiguous()
        if not len(stream) or stream.dtype is not torch.float32:
            layer = self.layer
            return type(layer).forward(layer, hidden_states, attention_mask)  # type: ignore[no-any-return]
        heads = self.heads.multiply(rounded_rows(stream)).view(*hidden_states.shape[:-1], -1)
        mixed = mixed_heads(attention, heads, attention_mask)
        middle = mixer.dense.packed.multiply(rounded_rows(mixed))
        inputs = rounded_rows(middle, norm=self._norm(mixer, stream, 0))
        feed = first.packed.multiply(inputs)
        output: Tensor = last.dense.packed.multiply(rounded_rows(feed, gelu=True))
        normalize(output, self._norm(last, middle, 1))
        return output.view(hidden_states.shape)

    def _norm(self, part: Any, residual: Tensor, number: int) -> Norm:
        return Norm(residual, part.LayerNorm.weight, part.LayerNorm.bias, self.epsilons[number])
