"""What rounding a layer in the bytes of its factors would lose, weighed as a method weighs errors."""

from __future__ import annotations

from aicompress.layer import Layer
from aicompress.methods.capabilities import Rounded
from aicompress.methods.factorize.budget.rounding import rounded
from aicompress.methods.factorize.weighting.roots import Weighting
from aicompress.weights import Weight


def weighed_rounding(layer: Layer, weight: Weight, nbytes: int, weighting: Weighting) -> Rounded | None:
    """The layer rounded in no more bytes than its compressed weight takes, as `rounded` has it."""
    whole = weighting.error(layer.weight)
    return rounded(layer, weight, nbytes, lambda other: (weighting.error(layer.weight - other.dense()), whole))
