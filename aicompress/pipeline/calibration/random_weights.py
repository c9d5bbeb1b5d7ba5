"""The structure of a model, searched for on random weights: how its parts belong together.

A plan needs it to refuse a model that cannot be rescaled or rotated before the first byte is written. No weight of the
checkpoint is read, two short samples run through one block after another, and no byte of an output depends on the
numbers: it is part of planning, and no measurement that a dry run would have to announce.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.views.noise import NoiseCheckpoint
from aicompress.errors import CompressError, Refused, first_line
from aicompress.pipeline.calibration.data import calibration_inputs
from aicompress.pipeline.calibration.request import StepInput, module_of
from aicompress.pipeline.step.models.running_model import example
from aicompress.pipeline.step.workers import Processes
from aicompress.recipe import Recipe

SAMPLES, LENGTH, TOKENS = 2, 16, 64  # of the inputs on which a model is tried

T = TypeVar("T")


def on_noise(step: StepInput, search: Callable[[Any, Any, Mapping[str, Tensor]], T]) -> T:
    """Search the model with random weights for its structure; no weight is read.

    Args:
        step: gives names and shapes, says what the model is where the checkpoint does not, and what its inputs are.
        search: (model on the meta device, loader of its parts, a small batch) -> the structure.

    Raises:
        Refused: nothing says what the model is, or it does not run.
    """
    from aicompress.model.loading.partial_model import PartialModel

    checkpoint, recipe = step.checkpoint, step.recipe
    if checkpoint.config is None and recipe.model is None:
        hint = "give a directory with config.json, or the recipe a `model:` section"
        raise Refused(f"{checkpoint.path} does not say how its layers are connected", hint)
    model = module_of(step)
    noise = NoiseCheckpoint(**{own.name: getattr(checkpoint, own.name) for own in fields(Checkpoint)})
    batch = _batch(checkpoint, recipe, model)
    try:
        return search(model, PartialModel(noise, model, dtype=torch.float32), batch)
    except CompressError:
        raise
    except Exception as error:  # whatever the model's own code raises for these inputs
        reason = first_line(error)
        hint = "take a method that rewrites nothing, such as gptq or rtn"
        raise Refused(f"{checkpoint.path}: its blocks do not run: {reason}", hint) from error


def _batch(checkpoint: Checkpoint, recipe: Recipe, model: Any) -> Mapping[str, Tensor]:
    """Two short samples: made up where the model says what it takes, else the first of the calibration data."""
    made = example(model, SAMPLES, LENGTH)
    if made is not None and isinstance(made[0], dict):
        return {name: tensor if tensor.is_floating_point() else tensor % TOKENS for name, tensor in made[0].items()}
    if recipe.calibration is None:
        hint = "give the recipe a calibration: section"
        raise Refused(f"{checkpoint.path}: nothing says what inputs the model takes", hint)
    few = recipe.calibration.at_most(SAMPLES, LENGTH)
    return calibration_inputs(checkpoint, model, few, recipe.seed, Processes()).batches[0]
