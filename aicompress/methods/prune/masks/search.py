"""Pattern search: of several patterns every layer gets the one whose loss per saved byte, or millisecond, is least.

A pattern that a processor or a mask stores well costs a layer more or less of its output, depending on how its weights
are spread; Ma et al. 2020, "PCONV", arXiv:1909.05073, choose kernel patterns layer by layer in this way.
Within a number of bytes for all layers together, it is the total loss that is least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aicompress.layer import Layer
from aicompress.methods.curvature import gram
from aicompress.methods.curvature import loss as output_error
from aicompress.methods.prune.masks.allocation import loss as felt_error
from aicompress.weights import Dense, Weight, outline_nbytes

Apply = Callable[[Layer, Any], Weight]


def saved_bytes(layer: Layer, weight: Weight) -> float:
    """Bytes that a form of a layer takes less than its dense matrix, in the smaller of a dense and a sparse form."""
    return outline_nbytes(Dense.outline(layer.info.shape, layer.info.dtype)) - outline_nbytes(weight)


def least(
    layer: Layer, options: Sequence[Any], apply: Apply, saved: Callable[[Layer, Weight], float] = saved_bytes
) -> int:
    """Number of the config whose loss per what it saves is least; of those that save nothing the one of least loss.

    Args:
        layer: with a Gram matrix; where its gradients are known the loss is what they feel.
        options: explicit configs.
        apply: the method.
        saved: what a weight saves of the dense one.
    """
    ranks = []
    for number, config in enumerate(options):
        weight = apply(layer, config.model_copy(update={"store": "auto"}))
        lost = _loss(layer, weight)
        gain = saved(layer, weight)
        ranks.append((gain <= 0, lost / gain if gain > 0 else lost, number))
    return min(ranks)[2]


def losses(layer: Layer, options: Sequence[Any], apply: Apply) -> list[float]:
    """What each config loses of a layer, as in `least`."""
    return [_loss(layer, apply(layer, config)) for config in options]


def _loss(layer: Layer, weight: Weight) -> float:
    pruned = weight.dense()
    if layer.gradients is not None:
        return felt_error(layer, pruned)
    return output_error((layer.weight - pruned).double(), gram(layer))
