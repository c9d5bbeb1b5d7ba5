"""Calibration inputs of a recipe as the batches a model takes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.data import Data, Source, arrays, batches, sentences, token_windows
from aicompress.errors import Refused
from aicompress.model.tokenizer import load_tokenizer
from aicompress.pipeline.processes import Processes

DEFAULT_SAMPLES = 128
ROWS = 4096  # tokens that run through the model at a time


@dataclass(frozen=True)
class Inputs:
    """Batches of one process.

    Attributes:
        batches: keyword arguments of the model's forward.
        source: where they come from, for the report.
    """

    batches: tuple[dict[str, Any], ...]
    source: Source


def calibration_inputs(checkpoint: Checkpoint, model: Any, data: Data, seed: int, team: Processes) -> Inputs:
    """Read and batch the calibration data; of several processes each takes its share.

    Language models get windows of exactly `length` tokens, encoders padded sentences, others their arrays.

    Raises:
        RecipeError: the data cannot be read.
        Refused: there are fewer samples than processes.
    """
    data = data if data.samples else data.model_copy(update={"samples": DEFAULT_SAMPLES})
    step = max(1, ROWS // (64 if data.kind == "arrays" else data.length))
    found: list[dict[str, Any]]
    if data.kind == "arrays":
        inputs, _, source = arrays(data, seed)
        name = _first_argument(model)
        step = _fair(step, len(inputs), team)
        found = [{name: inputs[at : at + step]} for at in range(0, len(inputs), step)]
    elif generates(checkpoint):
        windows, source = token_windows(data, load_tokenizer(checkpoint.source.folder), seed)
        step = _fair(step, len(windows), team)
        found = [_language(model, windows[at : at + step]) for at in range(0, len(windows), step)]
    else:
        texts, source = sentences(data, seed)
        step = _fair(step, len(texts), team)
        found = list(batches(texts, load_tokenizer(checkpoint.source.folder), step, data.length))
    return Inputs(tuple(found[team.rank :: team.size]), source)


def _fair(step: int, samples: int, team: Processes) -> int:
    """Samples in a batch, so few that every process has one."""
    if samples < team.size:
        raise Refused(f"{samples} calibration samples cannot be shared by {team.size} processes", "give more samples")
    return min(step, samples // team.size)


def _first_argument(model: Any) -> str:
    """What the model's forward calls its input."""
    return getattr(model, "main_input_name", None) or next(iter(inspect.signature(model.forward).parameters))


def generates(checkpoint: Checkpoint) -> bool:
    """Whether the architecture predicts tokens."""
    named = str(((checkpoint.config or {}).get("architectures") or [""])[0])
    return named.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def _language(model: Any, windows: Tensor) -> dict[str, Any]:
    plain: dict[str, Any] = {"input_ids": windows, "use_cache": False}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        plain["decoder_input_ids"] = windows
    return plain
