"""What calibration asks of texts: how long samples may be, and that they can be read."""

from __future__ import annotations

from aicompress.checkpoint import Checkpoint
from aicompress.data import Data, sentences, token_windows
from aicompress.errors import CompressError
from aicompress.model.loading.definitions.config import most_positions
from aicompress.model.loading.definitions.definition import has_generate, skeleton
from aicompress.recipe import Recipe


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
