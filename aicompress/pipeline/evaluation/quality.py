"""Measure what an eval recipe asks for, on running models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from aicompress.pipeline.evaluation.model_outputs import model_outputs
from aicompress.pipeline.step.running_model import Running
from aicompress.recipe.evaluation import EvalRecipe

Progress = Callable[[str, int, int], None]  # what, done, total


@torch.inference_mode()
def measure_quality(
    models: Sequence[Running], recipe: EvalRecipe, progress: Progress = lambda what, done, total: None
) -> dict[str, Any]:
    """Measure every figure that the recipe asks for.

    Args:
        models: the tested one, then its baselines.
        recipe: what to measure.
        progress: called with (what, done, total).

    Returns:
        Figures by name as the report stores them, each with the kernels that the tested model ran on; those against
        further baselines under `against`, by path.

    Raises:
        RecipeError, CheckpointError: data or models do not fit what is asked.
    """
    asked = recipe.quality.asked
    against: list[dict[str, Any]] = [{} for _ in models[1:]] or [{}]
    for number, (metric, data) in enumerate(asked):
        outputs = model_outputs(models, metric, data, _share(progress, metric.name, number, len(asked)))
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
