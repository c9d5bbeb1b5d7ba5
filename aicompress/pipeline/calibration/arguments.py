"""Samples of a recipe as the arguments of a model, and whether it takes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.data import Data, named_arrays, sentences, token_windows
from aicompress.errors import CompressError, RecipeError, suggestion
from aicompress.model.loading.definitions.config import most_positions
from aicompress.model.loading.definitions.definition import has_generate, skeleton
from aicompress.pipeline.step.models.accepted_inputs import input_problems, shaped, text_problems
from aicompress.pipeline.step.models.running_model import first_decoder_tokens
from aicompress.recipe import Calibration, Recipe


def generates(checkpoint: Checkpoint) -> bool:
    """Whether the architecture predicts tokens."""
    named = str(((checkpoint.config or {}).get("architectures") or [""])[0])
    if named.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return True
    return has_generate(checkpoint.config or {})  # such as MarianMTModel


def shortened(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """A warning where the model takes shorter samples than the calibration data asks for."""
    section = recipe.calibration
    if section is None or section.kind == "arrays" or checkpoint.config is None:
        return []
    length = sample_length(checkpoint, section)
    if length == section.length:
        return []
    return [f"calibration samples are {length} tokens long, not {section.length}: the model takes no more"]


def sample_length(checkpoint: Checkpoint, section: Data) -> int:
    """How long samples are: as long as the data section says, or the model's positions."""
    model = skeleton(checkpoint.config or {})
    most = None if model is None else most_positions(model)
    return min(section.length, most or section.length)


def unreadable(checkpoint: Checkpoint, recipe: Recipe) -> list[CompressError]:
    """Why not one sample can be made of a text; no more of it is read than that takes."""
    section = recipe.calibration
    if section is None or not section.is_file or section.kind == "arrays" or checkpoint.config is None:
        return []
    shorter = {"length": sample_length(checkpoint, section), "samples": 1}
    enough = section.model_copy(update=shorter)
    try:
        if generates(checkpoint):
            from aicompress.model.loading.tokenizer import load_tokenizer  # with transformers

            token_windows(enough, load_tokenizer(checkpoint.source.folder))
        else:
            sentences(enough)
    except CompressError as error:
        return [error]
    return []


DEFAULT_SAMPLES = 128  # taken where a recipe does not say, of sources that hold as many


def argument_problems(module: Any, data: Calibration, seed: int) -> list[CompressError]:
    """What keeps a model from running on calibration data.

    Args:
        module: the model without its weights.
        data: the recipe's section.
        seed: of the choice of samples.
    """
    if data.kind != "arrays":
        return text_problems(module, data)
    if len(data.input_names) > 1 and (absent := _unknown_arguments(module, data.input_names)):
        return absent
    try:
        named, _, _ = named_arrays(data, seed, DEFAULT_SAMPLES)
    except CompressError as error:
        return [error]
    return input_problems(module, named_arguments(module, named), data)


def _unknown_arguments(module: Any, names: Sequence[str]) -> list[CompressError]:
    """Arrays that the model has no argument for.

    One that takes any keyword hands it to models inside it: what one of these has an argument for is taken.
    """
    known = dict(inspect.signature(module.forward).parameters)
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values()):
        for inner in module.modules():
            if hasattr(inner, "main_input_name"):  # a model, not a layer
                known |= inspect.signature(inner.forward).parameters
    absent = [name for name in names if name not in known]
    kind = type(module).__name__
    return [RecipeError(f"inputs: {kind} takes no {name!r}", suggestion(name, list(known))) for name in absent]


def first_argument(module: Any) -> str:
    """What the model's forward calls its input."""
    return getattr(module, "main_input_name", None) or next(iter(inspect.signature(module.forward).parameters))


def named_arguments(model: Any, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Arrays by the model's arguments: one alone is also what the model calls its input."""
    if len(named) == 1 and next(iter(named)) not in inspect.signature(model.forward).parameters:
        return {first_argument(model): next(iter(named.values()))}
    return dict(named)


def arguments_of(model: Any, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arrays as a model takes them: each under its own name, one alone also as what the model calls its input.

    A decoder that is not given its own is given the same token ids, or its first token where they are none.
    """
    arguments: dict[str, Any] = {name: shaped(name, inputs) for name, inputs in named_arguments(model, named).items()}
    inputs = arguments.get(first_argument(model), next(iter(arguments.values())))
    first = first_decoder_tokens(model, len(inputs))
    if first is not None:
        given = {"decoder_input_ids": first if inputs.is_floating_point() else inputs, "use_cache": False}
        arguments = given | arguments
    return arguments
