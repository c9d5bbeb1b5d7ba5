"""Calibration inputs of a recipe as the batches a model takes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.data import Data, Source, arrays, batches, labelled, sentences, token_windows
from aicompress.errors import Refused
from aicompress.model.loading.tokenizer import load_tokenizer
from aicompress.model.sensitivity.loss import Sample
from aicompress.pipeline.calibration.requirements import generates
from aicompress.pipeline.step.workers import Processes

DEFAULT_SAMPLES = 128  # taken where a recipe does not say, of sources that hold as many
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


def calibration_inputs(
    checkpoint: Checkpoint, model: Any, data: Data, seed: int, team: Processes, most: int = ROWS
) -> Inputs:
    """Read and batch the calibration data; of several processes each takes its share.

    Language models get windows of exactly `length` tokens, encoders padded sentences, others their arrays.

    Args:
        most: samples in a batch, where memory allows for as many.

    Raises:
        RecipeError: the data cannot be read.
        Refused: there are fewer samples than processes.
    """
    step = min(most, max(1, ROWS // (64 if data.kind == "arrays" else data.length)))
    batched: list[dict[str, Any]]
    if data.kind == "arrays":
        inputs, _, source = arrays(data, seed, DEFAULT_SAMPLES)
        step = _fair(step, len(inputs), team)
        batched = [_arrays(model, inputs[at : at + step]) for at in range(0, len(inputs), step)]
    elif generates(checkpoint):
        windows, source = token_windows(data, load_tokenizer(checkpoint.source.folder), seed, DEFAULT_SAMPLES)
        step = _fair(step, len(windows), team)
        batched = [_language(model, windows[at : at + step]) for at in range(0, len(windows), step)]
    else:
        texts, source = sentences(data, seed, DEFAULT_SAMPLES)
        step = _fair(step, len(texts), team)
        batched = list(batches(texts, load_tokenizer(checkpoint.source.folder), step, data.length))
    return Inputs(tuple(batched[team.rank :: team.size]), source)


def samples(checkpoint: Checkpoint, model: Any, data: Data, seed: int, team: Processes) -> tuple[Sample, ...]:
    """The calibration data as single samples whose loss can be taken; of several processes each takes its share.

    Language models predict the next token of windows; texts and arrays have labels where the data names them.

    Raises:
        RecipeError: the data cannot be read.
        Refused: there are fewer samples than processes.
    """
    labels: Tensor | None = None
    given: list[dict[str, Any]]
    predicts = generates(checkpoint)
    if data.kind == "arrays":
        inputs, labels, _ = arrays(data, seed, DEFAULT_SAMPLES)
        given = [_arrays(model, inputs[at : at + 1]) for at in range(len(inputs))]
        predicts = predicts and not inputs.is_floating_point()
    elif predicts:
        windows, _ = token_windows(data, load_tokenizer(checkpoint.source.folder), seed, DEFAULT_SAMPLES)
        given = [_language(model, windows[at : at + 1]) for at in range(len(windows))]
    else:
        if data.labels is not None:
            texts, labels, _ = labelled(data, seed, class_names(checkpoint), DEFAULT_SAMPLES)
        else:
            texts, _ = sentences(data, seed, DEFAULT_SAMPLES)
        tokenizer = load_tokenizer(checkpoint.source.folder)
        given = [batch for text in texts for batch in batches([text], tokenizer, 1, data.length)]
    _fair(1, len(given), team)
    own = []
    for number in range(team.rank, len(given), team.size):
        tokens = given[number].get("decoder_input_ids", given[number].get("input_ids")) if predicts else None
        label = None if labels is None or tokens is not None else labels[number : number + 1]
        own.append(Sample(number, given[number], label, tokens))
    return tuple(own)


def class_names(checkpoint: Checkpoint) -> list[str]:
    """A classifier's classes in order."""
    named = (checkpoint.config or {}).get("id2label") or {}
    return [str(named[key]) for key in sorted(named, key=int)]


def _arrays(model: Any, inputs: Tensor) -> dict[str, Any]:
    """Arrays as a model takes them; a decoder is given the same token ids, or its first token where they are none."""
    name = _first_argument(model)
    arguments: dict[str, Any] = {name: _shaped(name, inputs)}
    described = getattr(model, "config", None)
    if getattr(described, "is_encoder_decoder", False):
        start = getattr(described, "decoder_start_token_id", None) or getattr(described, "bos_token_id", None) or 0
        first = torch.full((len(inputs), 1), start, dtype=torch.int64)
        arguments |= {"decoder_input_ids": first if inputs.is_floating_point() else inputs, "use_cache": False}
    return arguments


def _shaped(name: str, inputs: Tensor) -> Tensor:
    """Arrays as a model takes them: images of one channel get that dimension."""
    return inputs[:, None] if name == "pixel_values" and inputs.ndim == 3 else inputs


def _fair(step: int, samples: int, team: Processes) -> int:
    """Samples in a batch, so few that every process has one."""
    if samples < team.size:
        raise Refused(f"{samples} calibration samples cannot be shared by {team.size} processes", "give more samples")
    return min(step, samples // team.size)


def _first_argument(model: Any) -> str:
    """What the model's forward calls its input."""
    return getattr(model, "main_input_name", None) or next(iter(inspect.signature(model.forward).parameters))


def _language(model: Any, windows: Tensor) -> dict[str, Any]:
    plain: dict[str, Any] = {"input_ids": windows, "use_cache": False}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        plain["decoder_input_ids"] = windows
    return plain
