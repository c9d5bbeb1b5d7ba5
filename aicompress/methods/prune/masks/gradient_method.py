"""One frame for methods that score weights by gradients: from scores to a mask, survivors refitted where asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.capabilities import Allocates, Reads
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune.masks.calibrated import check, describe, finished, outline, resolve
from aicompress.methods.prune.masks.gradient_scores import NEEDS, GradientConfig, reads, surveyed
from aicompress.methods.prune.masks.permutation import permuting
from aicompress.methods.prune.masks.sparsity import choose
from aicompress.methods.prune.masks.survey import surveying
from aicompress.weights import Weight

G = TypeVar("G", bound=GradientConfig)


def differentiated(config: type[G], scores: Callable[[Layer, G], Tensor], summary: str, *, when: str) -> LayerMethod[G]:
    """A method that keeps the weights of highest score.

    Args:
        config: its parameters; their name is the method's.
        scores: from a layer with gradients to the worth of every weight, (out, in), that layers can be compared by.
        summary: a line for the list of methods.
        when: as of every method.
    """

    def apply(layer: Layer, given: G) -> Weight:
        return finished(layer, choose(layer, scores(layer, given), given), given)

    permuted = permuting(apply, scores)
    return LayerMethod(
        name=config.model_fields["name"].default,
        command="prune",
        summary=summary,
        when=when,
        config=config,
        needs=NEEDS,
        apply=permuted,
        outline=outline,
        check=check,
        allocates=Allocates(resolve),
        describe=describe,
        reading=Reads(reads, lambda given: given.shift > 0),
        surveys=surveying(permuted, scores, surveyed),
    )
