"""Calibration inputs of a recipe as the batches a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.data import Data, Source, arrays, batches, sentences, token_windows
from aicompress.model.tokenizer import load_tokenizer

DEFAULT_SAMPLES = 128
ROWS = 4096  # tokens that run through the model at a time


@dataclass(frozen=True)
class Inputs:
    """Batches of one process.

    Attributes:
        batches: keyword arguments of the model's forward.
        source: where they come from, for the report.
    """

    batches: tuple[dict[str, Tensor], ...]
    source: Source


def calibration_inputs(checkpoint: Checkpoint, model: Any, data: Data, seed: int) -> Inputs:
    """Read and batch the calibration data; under torchrun each process takes its share.

    Language models get windows of exactly `length` tokens, encoders padded sentences, others their arrays.
    """
    data = data if data.samples else replace_samples(data)
    if data.kind == "arrays":
        inputs, _, source = arrays(data, seed)
        name = getattr(model, "main_input_name", "input")
        step = max(1, ROWS // 64)
        found = [{name: inputs[at : at + step]} for at in range(0, len(inputs), step)]
    elif generates(checkpoint):
        windows, source = token_windows(data, load_tokenizer(checkpoint.source.folder), seed)
        step = max(1, ROWS // data.length)
        found = [_language(model, windows[at : at + step]) for at in range(0, len(windows), step)]
    else:
        texts, source = sentences(data, seed)
        found = list(batches(texts, load_tokenizer(checkpoint.source.folder), max(1, ROWS // data.length), data.length))
    return Inputs(tuple(_my_share(found)), source)


def replace_samples(data: Data) -> Data:
    """The default number of samples where the recipe gives none."""
    return data.model_copy(update={"samples": DEFAULT_SAMPLES})


def generates(checkpoint: Checkpoint) -> bool:
    """Whether the architecture predicts tokens."""
    named = str(((checkpoint.config or {}).get("architectures") or [""])[0])
    return named.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def _language(model: Any, windows: Tensor) -> dict[str, Any]:
    plain: dict[str, Any] = {"input_ids": windows, "use_cache": False}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        plain["decoder_input_ids"] = windows
    return plain


def _my_share(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every world_size-th batch under torchrun, all of them otherwise."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return list(found)
    return list(found[distributed.get_rank() :: distributed.get_world_size()])


__all__ = ["Inputs", "calibration_inputs", "generates"]
