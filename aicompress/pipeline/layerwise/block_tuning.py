"""Block tuning in a calibrated step: which layers move, and their weights after it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

from aicompress.methods.zeros import mask_of
from aicompress.model.blocks.reconstruction import Stage, TunableLayer, TuningSchedule, moves, tune
from aicompress.model.loading.divided import Divided
from aicompress.model.loading.merged_experts import Slot
from aicompress.pipeline.layerwise.compress import Compressed
from aicompress.pipeline.step.layer_plan import LayerPlan, layer_seed
from aicompress.recipe import Tune


def can_move(jobs: Sequence[LayerPlan]) -> bool:
    """Whether a parameter becomes a weight that may move: a whole one without zeros to be kept."""
    (job, *more) = jobs
    return not more and not job.info.part and moves(job.outline) and mask_of(job.info.outline) is None


def tuned(
    settings: Tune,
    seed: int,
    stage: Stage,
    layers: Mapping[str, Compressed],
    places: Mapping[str, str | Slot | Divided],
) -> dict[str, Compressed]:
    """The layers of a block with their weights after tuning, by parameter.

    Args:
        settings: how to tune.
        seed: of the step.
        stage: the block.
        layers: by parameter those that may move.
        places: where the model has each parameter; one that is merged with others, or divided, stays.
    """
    start = time.perf_counter()
    movable: dict[str, TunableLayer] = {}
    for name, compressed in layers.items():
        place, info = places.get(name), compressed.layer.info
        if isinstance(place, str) and moves(compressed.weight):
            parameter = f"{place.removeprefix(stage.name).removeprefix('.')}.weight"
            original = compressed.layer.weight
            movable[name] = TunableLayer(parameter, compressed.weight, original, info.tensor_shape, info.transposed)
    if not movable:
        return {}
    pace = TuningSchedule(settings.steps, settings.rate, settings.scale_rate, settings.factor_rate)
    weights = tune(stage, list(movable.values()), pace, layer_seed(seed, stage.name))
    share = (time.perf_counter() - start) / len(movable)
    return {
        name: dataclasses.replace(layers[name], weight=weight, seconds=layers[name].seconds + share)
        for name, weight in zip(movable, weights, strict=True)
    }
