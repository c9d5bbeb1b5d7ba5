"""What a network takes: of the calibration data, of the recipe, or the first common shape that it accepts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from aicompress.errors import RecipeError, first_line
from aicompress.model.channels.graph import forward
from aicompress.pipeline.step.models import running_model as running
from aicompress.pipeline.step.models.accepted_inputs import as_taken

EXAMPLES = 2  # samples of a trial
_SIDES = (32, 28, 224, 64, 96, 128, 256, 299, 384, 512, *range(1, 64))  # of images, in the order of a guess


def example(module: nn.Module, first: Any | None, shape: tuple[int, ...] | None) -> Any:
    """Inputs of one forward pass.

    Args:
        first: a batch of calibration data, if there is any.
        shape: of one input, where the recipe gives it.

    Raises:
        RecipeError: the module does not take them, or nothing says what it takes.
    """
    if first is not None:
        taken = {key: value[:EXAMPLES] for key, value in first.items()} if isinstance(first, dict) else first[:EXAMPLES]
        _require(module, taken, "calibration")
        return taken
    generator = torch.Generator().manual_seed(0)
    if shape is not None:
        given = as_taken(module, torch.randn(EXAMPLES, *shape, generator=generator))
        _require(module, given, "method.input_shape")
        return given
    named = running.example(module, EXAMPLES, 0)
    if named is not None:
        return named[0]
    for guess in _guesses(module):
        given = torch.randn(EXAMPLES, *guess, generator=generator)
        if _refusal(module, given) is None:
            return given
    raise RecipeError("nothing says what the network takes", "give method.input_shape, or calibration data")


def _guesses(module: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes that fit the first layer."""
    layer = next((each for each in module.modules() if isinstance(each, nn.Linear | nn.modules.conv._ConvNd)), None)
    if isinstance(layer, nn.Linear):
        yield (layer.in_features,)
    elif layer is not None:
        dimensions = len(layer.kernel_size)
        yield from ((layer.in_channels, *[side] * dimensions) for side in _SIDES)
        if layer.in_channels == 1:  # a module that adds the channel itself
            yield from ((side,) * dimensions for side in _SIDES)


def _require(module: nn.Module, inputs: Any, where: str) -> None:
    reason = _refusal(module, inputs)
    if reason is not None:
        shape = tuple((next(iter(inputs.values())) if isinstance(inputs, dict) else inputs).shape[1:])
        raise RecipeError(f"{where}: the network does not take inputs {shape}: {reason}", "")


def _refusal(module: nn.Module, inputs: Any) -> str | None:
    try:
        with torch.no_grad():
            forward(module, inputs)
    except Exception as error:  # whatever a wrong shape breaks in the module's own code
        return first_line(error)
    return None
