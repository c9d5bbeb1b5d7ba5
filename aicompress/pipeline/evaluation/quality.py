"""Measure what an eval recipe asks for, on running models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from aicompress.data import Source
from aicompress.pipeline.evaluation.model_outputs import Watcher, model_outputs
from aicompress.pipeline.step.running_model import Running
from aicompress.recipe.evaluation import EvalRecipe

Progress = Callable[[str, int, int], None]  # what, done, total
Read = Callable[[str, Source], None]  # a metric's name, where its samples came from


@torch.inference_mode()
def measure_quality(
    models: Sequence[Running],
    recipe: EvalRecipe,
    progress: Progress = lambda what, done, total: None,
    read: Read = lambda metric, source: None,
) -> dict[str, Any]:
    """Measure every figure that the recipe asks for.

    Args:
        models: the tested one, then its baselines.
        recipe: what to measure.
        progress: called with (what, done, total).
        read: called with the record of each metric's samples.

    Returns:
        Figures by name as the report stores them, each with the kernels that the tested model ran on; those against
        further baselines under `against`, by path.

    Raises:
        RecipeError, CheckpointError: data or models do not fit what is asked.
    """
    asked = recipe.quality.asked
    against: list[dict[str, Any]] = [{} for _ in models[1:]] or [{}]
    for number, (metric, data) in enumerate(asked):
        watcher = Watcher(partial(read, metric.name), _share(progress, metric.name, number, len(asked)))
        outputs = model_outputs(models, metric, data, watcher)
        measured = metric.measure(outputs, data, recipe.seed)
        for figures, entries in zip(against, metric.entries(measured), strict=True):
            figures.update({name: {**entry, "kernels": models[0].kernels} for name, entry in entries.items()})
    quality = dict(against[0])
    if len(against) > 1:
        quality["against"] = {model.path: figures for model, figures in zip(models[2:], against[1:], strict=True)}
    return quality


def _share(progress: Progress, what: str, number: int, of: int) -> Callable[[int, int], None]:
    """Report the progress of one metric as a share of the whole."""
    return lambda done, total: progress(what, number * total + done, of * total)
