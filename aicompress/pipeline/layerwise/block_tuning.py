"""Block tuning in a calibrated step: which layers move, and their weights after it."""

from __future__ import annotations

import time
from collections.abc import Mapping

from aicompress.methods.zeros import mask_of
from aicompress.model.blocks.reconstruction import Movable, Pace, Stage, tune
from aicompress.model.loading.merged_experts import Slot
from aicompress.pipeline.layerwise.compress import Known, Ready, layer_of
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.step.layer_plan import layer_seed
from aicompress.weights import IntGrouped


def can_move(plan: Plan, name: str) -> bool:
    """Whether a parameter becomes integer codes that may move: a whole one without zeros to be kept."""
    (job, *more) = plan.by_tensor[name]
    return not more and not job.info.part and isinstance(job.outline, IntGrouped) and mask_of(job.info.outline) is None


def tuned(plan: Plan, stage: Stage, ready: Mapping[str, Ready], places: Mapping[str, str | Slot]) -> dict[str, Ready]:
    """The weights of a block's layers after tuning, by parameter.

    Args:
        plan: the step; its recipe says how to tune.
        stage: the block.
        ready: what its layers are compressed to.
        places: where the model has each parameter; one that is merged with others keeps its codes.
    """
    assert plan.recipe.tune is not None
    start = time.perf_counter()
    layers: dict[str, Movable] = {}
    for name, found in ready.items():
        place, (job, *_) = places.get(name), plan.by_tensor[name]
        if not isinstance(place, str) or not isinstance(found.weight, IntGrouped) or not can_move(plan, name):
            continue
        parameter = f"{place.removeprefix(stage.name).removeprefix('.')}.weight"
        wanted = layer_of(plan, job.info, Known()).weight
        layers[name] = Movable(parameter, found.weight, wanted, job.info.tensor_shape, job.info.transposed)
    if not layers:
        return {}
    pace = Pace(plan.recipe.tune.steps, plan.recipe.tune.rate, plan.recipe.tune.scale_rate)
    weights = tune(stage, list(layers.values()), pace, layer_seed(plan.recipe.seed, stage.name))
    share = (time.perf_counter() - start) / len(layers)
    return {name: Ready(weight, ready[name].seconds + share) for name, weight in zip(layers, weights, strict=True)}
