"""Levels that are found: contiguous blocks of like sensitivity, the most sensitive level first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from aicompress.errors import CompressError, RecipeError, raise_all
from aicompress.layer import LayerInfo
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.methods.method import OF_TRAINING
from aicompress.methods.partition import contiguous_parts
from aicompress.pipeline.calibration import requirements
from aicompress.pipeline.calibration.request import StepInput
from aicompress.pipeline.layerwise.allocation.block_losses import BlockLayers, by_outputs, by_weights
from aicompress.pipeline.layerwise.plan import planned_at
from aicompress.pipeline.layerwise.resolve import configured, open_widths, resolved, searches
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.survey import SurveyResult
from aicompress.recipe import Level, MeasuredLevels, Recipe

LEAST = 1e-9  # of the greatest loss: a block that loses nothing has a logarithm, too


@dataclass(frozen=True)
class Sensitivities:
    """What was measured of blocks to find levels; empty where none were to be found.

    Attributes:
        notes: the levels and their blocks' sensitivities, for the plan and the report.
        record: of the calibration data.
    """

    notes: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)


def with_levels(
    step: StepInput, method: AnyLayerMethod, chosen: list[LayerInfo], problems: Sequence[CompressError]
) -> tuple[Recipe, Sensitivities]:
    """The recipe with levels by depth in the place of those that are to be found, and what was measured for it.

    Blocks are compressed one at a time as the recipe says without levels. With calibration data the model's outputs are
    compared, without it the weights.

    Args:
        step, method: the input, and the recipe's method.
        chosen: layers that the recipe selects.
        problems: what is known to be wrong, and keeps the model from running.

    Raises:
        Refused: or Problems, what is wrong.
    """
    checkpoint, recipe = step.checkpoint, step.recipe
    wanted = recipe.measured_levels
    if wanted is None:
        return recipe, Sensitivities()
    layers, misfits = configured(chosen, recipe, method)
    known = [*problems, *misfits, *requirements.problems(step, method, list(layers.values()))]
    governed = {name: x for name, x in layers.items() if x.rule == "method" and x.info.index is not None}
    depths = sorted({layer.info.index for layer in governed.values() if layer.info.index is not None})
    raise_all([*known, *_problems(recipe, method, wanted, list(governed.values()), depths)])
    explicit, _ = resolved(checkpoint, governed, method, recipe.seed)
    blocks = BlockLayers(step, method, _by_depth(method, explicit, depths))

    def measure(progress: Progress) -> SurveyResult:
        return by_weights(blocks, progress) if recipe.calibration is None else by_outputs(blocks, progress)

    measured = step.request.survey.recorded(f"sensitivity of {len(depths)} blocks", checkpoint, recipe, measure)
    levels, notes = _divided(wanted, depths, measured.tensors["losses"].tolist())
    return recipe.with_levels(levels), Sensitivities((_meaning(measured), *notes), measured.record)


def _divided(wanted: MeasuredLevels, depths: Sequence[int], losses: Sequence[float]) -> tuple[list[Level], list[str]]:
    """Levels by depth, the most sensitive first, and what each has in words."""
    floor = max(max(losses) * LEAST, 1e-300)
    logarithms = [math.log(max(loss, floor)) for loss in losses]
    parts = contiguous_parts(logarithms, wanted.auto)
    parts.sort(key=lambda part: fmean(logarithms[place] for place in part), reverse=True)
    levels, notes = [], []
    for number, (part, values) in enumerate(zip(parts, wanted.values, strict=True)):
        level = Level(layers=_span(depths[part[0]], depths[part[-1]]), skip=values.skip, **values.fields)
        fields = ", ".join(f"{name} {value}" for name, value in level.fields.items())
        shown = ", ".join(f"{losses[place]:.3g}" for place in part)
        given = "left as they are" if level.skip else fields or "as the method says"
        notes.append(f"levels[{number}]: blocks {level.layers}, {given}; sensitivity {shown}")
        levels.append(level)
    return levels, notes


def _meaning(measured: SurveyResult) -> str:
    """What a sensitivity is, in words."""
    what = "the relative squared error of its weights, as there is no calibration data,"
    if "divergence" in measured.tensors:
        kind = "the KL divergence" if bool(measured.tensors["divergence"]) else "the relative squared error"
        what = f"{kind} of the model's outputs on calibration data"
    return f"levels: the sensitivity of a block is {what} with this block alone compressed"


def _problems(
    recipe: Recipe,
    method: AnyLayerMethod,
    wanted: MeasuredLevels,
    layers: Sequence[LayerPlan],
    depths: Sequence[int],
) -> list[CompressError]:
    """Why levels cannot be found, or their values not be given."""
    if not depths:
        return [RecipeError("levels: no layer that they are for has a depth in its name", "use rules")]
    if method.needs & OF_TRAINING:
        message = (
            f"levels: blocks are compressed to find them, and {method.name} reads what a training run has recorded"
        )
        return [RecipeError(message, "give levels by depth")]
    if wanted.auto > len(depths):
        hint = f"give at most {len(depths)}"
        return [RecipeError(f"levels: {wanted.auto} levels cannot be made of {len(depths)} blocks", hint)]
    problems: list[CompressError] = []
    for number, values in enumerate(wanted.values):
        everything = Level(layers=_span(depths[0], depths[-1]), skip=values.skip, **values.fields)
        try:
            recipe.with_levels([everything]).config_for(layers[0].info)
        except CompressError as error:
            problems.append(RecipeError(f"levels.values.{number}: {error.message}", error.hint))
    return problems


def _by_depth(
    method: AnyLayerMethod, layers: Mapping[str, LayerPlan], depths: Sequence[int]
) -> dict[int, dict[str, list[LayerPlan]]]:
    """The layers by depth and parameter, those whose width is open with the least."""
    opened = searches(method, layers)
    blocks: dict[int, dict[str, list[LayerPlan]]] = {depth: {} for depth in depths}
    for name, layer in layers.items():
        planned = planned_at(method, layer, open_widths(method, layer)[0] if name in opened else None)
        assert layer.info.index is not None
        blocks[layer.info.index].setdefault(layer.info.tensor, []).append(planned)
    return blocks


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"
