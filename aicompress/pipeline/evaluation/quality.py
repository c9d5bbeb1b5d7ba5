"""Measure what an eval recipe asks for, on running models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from aicompress.data import Data
from aicompress.pipeline.evaluation.model_outputs import model_outputs
from aicompress.pipeline.evaluation.samples import AnyMetric, MetricSamples, fitting, read_samples
from aicompress.pipeline.step.models.running_model import Running
from aicompress.recipe.evaluation import EvalRecipe

Progress = Callable[[str, int, int], None]  # what, done, total
Asked = Sequence[tuple[AnyMetric, Data, MetricSamples]]  # metrics with their sections, and what they are measured on


def asked_quality(recipe: EvalRecipe, models: Sequence[Running]) -> Asked:
    """The metrics of a recipe with their samples, read for models whose weights are not needed.

    Raises:
        RecipeError, CheckpointError: data or models do not fit what is asked.
    """
    fitted = [(metric, fitting(models, metric, data)) for metric, data in recipe.quality.asked]
    return [(metric, data, read_samples(models, metric, data)) for metric, data in fitted]


def shortened(recipe: EvalRecipe, asked: Asked) -> Iterator[str]:
    """A warning for each metric whose samples are shorter than the recipe asks, for the models take no more."""
    for (metric, data), (_, fitted, _) in zip(recipe.quality.asked, asked, strict=True):
        if fitted.length < data.length:
            yield (
                f"{metric.name}: samples are {fitted.length} tokens long, not {data.length}: the model takes no more"
            )


@torch.inference_mode()
def measure_quality(
    models: Sequence[Running], asked: Asked, seed: int, progress: Progress = lambda what, done, total: None
) -> dict[str, Any]:
    """Measure every figure that is asked for.

    Args:
        models: the tested one, then its baselines.
        asked: what to measure, and on which samples.
        seed: for resampling.
        progress: called with (what, done, total).

    Returns:
        Figures by name as the report stores them, each with the kernels that the tested model ran on and, where it is
        held against a baseline, those of that; figures against further baselines under `against`, by path.

    Raises:
        RecipeError, CheckpointError: the models do not give what is asked.
    """
    against: list[dict[str, Any]] = [{} for _ in models[1:]] or [{}]
    ran = [{"kernels": models[0].kernels, "baseline_kernels": model.kernels} for model in models[1:]]
    ran = ran or [{"kernels": models[0].kernels}]
    for number, (metric, data, samples) in enumerate(asked):
        outputs = model_outputs(models, metric, data, samples, _share(progress, metric.name, number, len(asked)))
        measured = metric.measure(outputs, data, seed)
        for figures, entries, named in zip(against, metric.entries(measured), ran, strict=True):
            figures.update({name: {**entry, **named} for name, entry in entries.items()})
    quality = dict(against[0])
    if len(against) > 1:
        quality["against"] = {model.path: figures for model, figures in zip(models[2:], against[1:], strict=True)}
    return quality


def _share(progress: Progress, what: str, number: int, of: int) -> Callable[[int, int], None]:
    """Report the progress of one metric as a share of the whole."""
    return lambda done, total: progress(what, number * total + done, of * total)
