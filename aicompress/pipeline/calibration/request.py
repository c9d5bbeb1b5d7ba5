"""How a step gets statistics of its layers' inputs: from files, or by running which model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aicompress.checkpoint import Checkpoint
from aicompress.layer import LayerInfo, MergedExperts
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.survey import Survey
from aicompress.recipe import Recipe

MIN_ROWS = 16  # with fewer calibration rows a layer is compressed as if nothing were known of its inputs


@dataclass(frozen=True)
class Request:
    """How a step gets its statistics, beside the recipe.

    Attributes:
        allow_code: the recipe's model.factory may run.
        stats: files of statistics: read (and merged) where they exist, one is collected where it does not.
        survey: what is measured on the running model while the step is planned.
    """

    allow_code: bool = False
    stats: tuple[Path, ...] = ()
    survey: Survey = field(default_factory=Survey)

    @property
    def reads_files(self) -> bool:
        """Whether all statistics are there already."""
        return bool(self.stats) and all(path.exists() for path in self.stats)


@dataclass(frozen=True)
class StepInput:
    """What a step is given.

    Attributes:
        checkpoint: the input.
        recipe: what to do with it.
        request: how it gets statistics.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    request: Request


@dataclass(frozen=True)
class Step(StepInput):
    """A step as far as calibration asks.

    Attributes:
        layers: the layers of the input, with the method's parameters for those that it acts on.
    """

    layers: Sequence[LayerPlan]


def experts_of(plan: Step) -> dict[str, MergedExperts]:
    """The experts that parameters hold which are compressed one by one, by name of the parameter."""
    return {layer.info.tensor: own for layer in plan.layers if (own := layer.info.experts) is not None}


def input_width(layers: Sequence[LayerInfo]) -> int:
    """Width of a parameter's input: of the whole layer, or of a low-rank one's inner factor."""
    whole = layers[0].tensor_shape
    inner = (info.shape[1] for info in layers if info.part != "out")
    return next(inner, whole[0] if layers[0].transposed else math.prod(whole[1:]))


def follows(recipe: Recipe) -> bool:
    """Whether a layer's statistics are those behind compressed layers, not behind the original ones."""
    return recipe.calibration is None or recipe.calibration.activations == "compressed"


def module_of(step: StepInput) -> Any:
    """The model to run, without its weights.

    Raises:
        Refused: nothing says what it is, or a factory without --allow-code.
    """
    from aicompress.model.loading.definitions.chain import module_for
    from aicompress.model.loading.load import build

    if step.recipe.model is not None:
        return module_for(step.checkpoint.path, step.recipe.model, step.request.allow_code)
    return build(step.checkpoint)
