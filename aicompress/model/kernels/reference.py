"""What a layer computes whose stored weight no fast kernel runs."""

from __future__ import annotations

from torch import nn

from aicompress.weights import Weight
from aicompress.weights.decoding import CONVOLUTIONS, factors


def reference_kernel(module: nn.Module, weight: Weight) -> str:
    """Name what a layer computes by its stored weight: parts one after the other, or the decoded matrix.

    Args:
        module: the layer as it runs.
        weight: what is stored.
    """
    from aicompress.model.hf.layers_aicompress import StoredConv, StoredEmbedding, StoredLinear  # with transformers

    chained = len(weight.parts()) if weight.form in CONVOLUTIONS else len(factors(weight.meta(), weight.tensors()))
    if isinstance(module, StoredConv) and module.groups == 1 and (chained == 2 or weight.form in CONVOLUTIONS):
        return f"reference: {chained} convolutions, one after the other"
    if isinstance(module, (StoredLinear, StoredEmbedding)) and chained > 1:
        return f"reference: {chained} factors, one after the other"
    return f"reference: {weight.form.replace('_', ' ')} decoded"
