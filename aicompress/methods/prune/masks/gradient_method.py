"""One frame for methods that score weights by gradients: from scores to a mask, survivors refitted where asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune.masks.calibrated import check, describe, finished, outline, settle
from aicompress.methods.prune.masks.gradient_scores import NEEDS, GradientConfig, spares, surveyed
from aicompress.methods.prune.masks.permutation import permuting
from aicompress.methods.prune.masks.sparsity import choose
from aicompress.weights import Weight


def differentiated(config: type[GradientConfig], scores: Callable[[Layer, Any], Tensor], summary: str) -> LayerMethod:
    """A method that keeps the weights of highest score.

    Args:
        config: its parameters; their name is the method's.
        scores: from a layer with gradients to the worth of every weight, (out, in), that layers can be compared by.
        summary: a line for the list of methods.
    """

    def apply(layer: Layer, given: GradientConfig) -> Weight:
        return finished(layer, choose(layer, scores(layer, given), given), given)

    return LayerMethod(
        name=config.model_fields["name"].default,
        command="prune",
        summary=summary,
        config=config,
        needs=NEEDS,
        apply=permuting(apply, scores),
        outline=outline,
        check=check,
        settle=settle,
        describe=describe,
        compares=lambda given: given.shift > 0,
        spares=spares,
        surveys=surveyed,
        scores=scores,
    )
