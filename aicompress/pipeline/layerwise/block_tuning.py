"""Block tuning in a calibrated step: which layers move, and their weights after it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from aicompress.methods.zeros import mask_of
from aicompress.model.blocks.moving_weights import TunableLayer, TuningSchedule, moves
from aicompress.model.blocks.reconstruction import Stage, tune
from aicompress.model.loading.places import Place
from aicompress.pipeline.layerwise.compress import Compressed
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.step.layer_plan import LayerPlan, layer_seed
from aicompress.recipe import Tune
from aicompress.weights import Dense


def can_move(jobs: Sequence[LayerPlan]) -> bool:
    """Whether a parameter becomes a weight that may move: a whole one without zeros to be kept."""
    (job, *more) = jobs
    return (
        not more
        and not job.info.part
        and job.info.experts is None
        and moves(job.outline)
        and mask_of(job.info.outline) is None
    )


def vectors(plan: Plan, paths: Mapping[str, str]) -> dict[str, str]:
    """Norms and biases that may move: where the model has each parameter of one axis, by its name in the checkpoint.

    Args:
        plan: the step.
        paths: of the parameters that the model has by themselves.
    """
    if plan.recipe.tune is None or not plan.recipe.tune.norms or plan.scaling_groups:
        return {}
    planned = plan.output.parameters
    return {
        name: path
        for name, path in paths.items()
        if name in planned and planned[name].weight is None and len(planned[name].dense.shape) == 1
    }


@dataclass(frozen=True)
class Tuned:
    """A block after tuning.

    Attributes:
        layers: those that could move, by parameter.
        vectors: its norms and biases, by parameter, as they are stored.
    """

    layers: Mapping[str, Compressed]
    vectors: Mapping[str, Tensor]


def tuned(
    settings: Tune,
    seed: int,
    stage: Stage,
    layers: Mapping[str, Compressed],
    places: Mapping[str, Place],
    beside: Mapping[str, str],
) -> Tuned:
    """Tune a block.

    Args:
        settings: how to tune.
        seed: of the step.
        stage: the block.
        layers: by parameter those that may move.
        places: where the model has each parameter; one that is merged with others, or divided, stays.
        beside: where the model has the norms and biases that may move, those of other blocks among them.
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
        return Tuned({}, {})
    own = _vectors(stage, beside)
    pace = TuningSchedule(settings.steps, settings.rate, settings.scale_rate, settings.factor_rate)
    weights = tune(stage, [*movable.values(), *own.values()], pace, layer_seed(seed, stage.name))
    share = (time.perf_counter() - start) / len(movable)
    return Tuned(
        {
            name: dataclasses.replace(layers[name], weight=weight, seconds=layers[name].seconds + share)
            for name, weight in zip(movable, weights, strict=False)
        },
        {name: weight.tensors()[""][0] for name, weight in zip(own, weights[len(movable) :], strict=True)},
    )


def _vectors(stage: Stage, beside: Mapping[str, str]) -> dict[str, TunableLayer]:
    """The norms and biases of a block."""
    own = dict(stage.module.named_parameters())
    paths = {name: path.removeprefix(f"{stage.name}.") for name, path in beside.items()}
    vectors = {name: (path, own[path].detach()) for name, path in paths.items() if path != beside[name] and path in own}
    return {
        name: TunableLayer(path, Dense(vector[None]), vector[None], tuple(vector.shape))
        for name, (path, vector) in vectors.items()
    }
