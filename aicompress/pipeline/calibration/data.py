"""Calibration inputs of a recipe as the batches a model takes, and the report's record of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.statistics import StatisticsFile
from aicompress.data import SampleSource, batches, drawn_windows, labelled, named_arrays, sentences, token_windows
from aicompress.errors import Refused
from aicompress.model.loading.definitions.config import class_names, most_positions
from aicompress.model.loading.tokenizer import load_tokenizer
from aicompress.model.sensitivity.loss import Sample
from aicompress.pipeline.calibration.arguments import DEFAULT_SAMPLES, arguments_of, generates
from aicompress.pipeline.step.workers import Processes
from aicompress.recipe import Calibration

ROWS = 4096  # tokens that run through the model at a time

Batches = list[dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """Batches of one process.

    Attributes:
        batches: keyword arguments of the model's forward.
        sources: where they come from, for the report.
        weights: how much each batch's tokens count; empty: all alike.
    """

    batches: tuple[dict[str, Any], ...]
    sources: tuple[SampleSource, ...]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class SampleSet:
    """Samples of one source.

    Attributes:
        count: how many there are.
        batched: in batches of so many.
        source: where they come from.
        labels: (samples,) int64, or None.
        predicts: the model predicts their tokens.
    """

    count: int
    batched: Callable[[int], Batches]
    source: SampleSource
    labels: Tensor | None = None
    predicts: bool = False


def calibration_inputs(
    checkpoint: Checkpoint, model: Any, data: Calibration, seed: int, team: Processes, most: int = ROWS
) -> Inputs:
    """Read, or draw, and batch the calibration data; of several processes each takes its share.

    Language models get windows of exactly `length` tokens, encoders padded sentences, others their arrays. Of read and
    drawn samples together each kind counts half, however many it has.

    Args:
        most: samples in a batch, where memory allows for as many.

    Raises:
        RecipeError: the data cannot be read.
        Refused: there are fewer samples than processes.
    """
    step = min(most, max(1, ROWS // (64 if data.kind == "arrays" else data.length)))
    sets = list(_sample_sets(checkpoint, model, data, seed))
    step = _fair(step, sum(each.count for each in sets), team)
    batched = [each.batched(step) for each in sets]
    weights: list[float] = []
    if len(sets) > 1:
        for part, weight in zip(batched, _weights([_tokens(part) for part in batched]), strict=True):
            weights += [weight] * len(part)
    whole = [batch for part in batched for batch in part]
    _require_rows(checkpoint, model, whole)
    own = slice(team.rank, None, team.size)
    return Inputs(tuple(whole[own]), tuple(each.source for each in sets), tuple(weights[own]))


def _require_rows(checkpoint: Checkpoint, model: Any, given: Batches) -> None:
    """Every token must have a row in the model's table of embeddings.

    Raises:
        Refused: one has none.
    """
    try:
        rows = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):  # no language model, or a table of its own kind
        return
    largest = max((int(batch["input_ids"].max()) for batch in given if "input_ids" in batch), default=-1)
    if largest >= rows:
        message = f"{checkpoint.path} has {rows} tokens, and its calibration inputs hold token {largest}"
        raise Refused(message, "put the tokenizer beside it that it was trained with")


def samples(checkpoint: Checkpoint, model: Any, data: Calibration, seed: int, team: Processes) -> tuple[Sample, ...]:
    """The calibration data as single samples whose loss can be taken; of several processes each takes its share.

    Language models predict the next token of windows; texts and arrays have labels where the data names them.

    Raises:
        RecipeError: the data cannot be read.
        Refused: there are fewer samples than processes.
    """
    sets = list(_sample_sets(checkpoint, model, data, seed, classes=True))
    _fair(1, sum(each.count for each in sets), team)
    every: list[Sample] = []
    for each, weight in zip(sets, _weights([each.count for each in sets]), strict=True):
        for place, given in enumerate(each.batched(1)):
            tokens = given.get("decoder_input_ids", given.get("input_ids")) if each.predicts else None
            label = None if each.labels is None or tokens is not None else each.labels[place : place + 1]
            every.append(Sample(len(every), given, label, tokens, weight))
    return tuple(every[team.rank :: team.size])


def _sample_sets(
    checkpoint: Checkpoint, model: Any, data: Calibration, seed: int, classes: bool = False
) -> Iterator[SampleSet]:
    """What a recipe's source holds, and what it draws.

    Args:
        classes: texts are read with the labels that the data names.
    """
    if data.kind == "arrays":
        yield _of_arrays(checkpoint, model, data, seed)
        return
    predicts, tokenizer = generates(checkpoint), load_tokenizer(checkpoint.source.folder)
    shorter = min(data.length, most_positions(model) or data.length)  # the plan has said so
    data = data.model_copy(update={"length": shorter})
    if data.kind != "drawn" and predicts:
        windows, source = token_windows(data, tokenizer, seed, DEFAULT_SAMPLES)
        yield SampleSet(len(windows), partial(_windows, model, windows), source, predicts=True)
    elif data.kind != "drawn":
        labels: Tensor | None = None
        if classes and data.labels is not None:
            texts, labels, source = labelled(data, seed, class_names(model), DEFAULT_SAMPLES)
        else:
            texts, source = sentences(data, seed, DEFAULT_SAMPLES)
        yield SampleSet(len(texts), lambda step: list(batches(texts, tokenizer, step, shorter)), source, labels)
    if data.drawn is not None:
        ids, source = drawn_windows(tokenizer, data.drawn, shorter, seed, (data.bos or not predicts, not predicts))
        split = partial(_windows, model, ids) if predicts else partial(_drawn_texts, ids)
        yield SampleSet(len(ids), split, source, predicts=predicts)


def _of_arrays(checkpoint: Checkpoint, model: Any, data: Calibration, seed: int) -> SampleSet:
    inputs, labels, source = named_arrays(data, seed, DEFAULT_SAMPLES)
    tokens = inputs.keys() & {"input_ids", "decoder_input_ids"}
    predicts = generates(checkpoint) and bool(tokens or not any(each.is_floating_point() for each in inputs.values()))

    def batched(step: int) -> Batches:
        starts = range(0, source.samples, step)
        return [arguments_of(model, {name: each[at : at + step] for name, each in inputs.items()}) for at in starts]

    return SampleSet(source.samples, batched, source, labels, predicts)


def _windows(model: Any, windows: Tensor, step: int) -> Batches:
    return [_language(model, windows[at : at + step]) for at in range(0, len(windows), step)]


def _drawn_texts(ids: Tensor, step: int) -> Batches:
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.split(ids, step)]


def _weights(sizes: list[int]) -> list[float]:
    """What an item of each part weighs, so that all parts weigh the same and an item 1 on average."""
    return [sum(sizes) / (len(sizes) * size) for size in sizes]


def _tokens(part: Batches) -> int:
    """Real tokens in batches of texts."""
    masks = (batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in part)
    return sum(int(mask.sum()) for mask in masks)


def _fair(step: int, samples: int, team: Processes) -> int:
    """Samples in a batch, so few that every process has one."""
    if samples < team.size:
        raise Refused(f"{samples} calibration samples cannot be shared by {team.size} processes", "give more samples")
    return min(step, samples // team.size)


def _language(model: Any, windows: Tensor) -> dict[str, Any]:
    plain: dict[str, Any] = {"input_ids": windows, "use_cache": False}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        plain["decoder_input_ids"] = windows
    return plain


def record_of_data(given: Sequence[SampleSource], processes: int, **settings: str) -> dict[str, Any]:
    """The record of samples that ran through the model.

    Args:
        given: where the samples came from.
        processes: how many processes ran them.
        settings: how the model ran.
    """
    return {
        "data": [dataclasses.asdict(source) for source in given],
        "statistics": [],
        "processes": processes,
        **settings,
    }


def record_of_files(files: Sequence[StatisticsFile]) -> dict[str, Any]:
    """The record of statistics that were read from files: the samples behind them, and the files."""
    sources = [source for file in files for source in file.calibration.get("data", [])]
    return {"data": sources, "statistics": [str(file.path) for file in files], "processes": 1}
