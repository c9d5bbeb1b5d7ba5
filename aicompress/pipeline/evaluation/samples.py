"""Read the samples that metrics are measured on, before anything is timed: what does not fit is refused at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.data import Data, SampleSource, arrays, batches, labelled, pairs, sentences
from aicompress.errors import CheckpointError, RecipeError, raise_all
from aicompress.metrics import Metric
from aicompress.metrics.outputs import ClassLogits, ModelOutputs, PairEmbeddings, SentenceEmbeddings, TokenLogits
from aicompress.model.loading.definitions.chain import module_for
from aicompress.model.loading.definitions.config import class_names, most_positions
from aicompress.model.loading.definitions.definition import skeleton
from aicompress.pipeline.evaluation.sequences import Sequences, encodes, sequences
from aicompress.pipeline.step.models.accepted_inputs import input_problems, run_error, text_problems
from aicompress.pipeline.step.models.running_model import Inputs, Running
from aicompress.recipe import Model

BATCH = 64  # samples that a classifier sees at once
Models = Sequence[Running]  # the tested one, then its baselines
AnyMetric = Metric[Any, Any]


@dataclass(frozen=True)
class MetricSamples:
    """Samples of a metric; what they are, a subclass says.

    Attributes:
        source: where they came from.
    """

    source: SampleSource


@dataclass(frozen=True)
class Windows(MetricSamples):
    """Windows of tokens, and what is predicted of them."""

    read: Sequences


@dataclass(frozen=True)
class Labelled(MetricSamples):
    """Inputs of a classifier in batches, and labels (samples,) int64."""

    inputs: tuple[Inputs, ...]
    labels: Tensor


@dataclass(frozen=True)
class Pairs(MetricSamples):
    """Pairs of sentences, and scores (pairs,)."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: Tensor


@dataclass(frozen=True)
class Sentences(MetricSamples):
    """Sentences."""

    texts: tuple[str, ...]


def outlined(checkpoint: Checkpoint, path: str, model: Model | None = None, allow_code: bool = False) -> Running:
    """A checkpoint as samples are read for it, without weights: its architecture, or the module of a recipe."""
    module = None if checkpoint.config is None else skeleton(checkpoint.config)
    if checkpoint.config is None and model is not None:
        module = module_for(checkpoint.path, model, allow_code)
    return Running(path, nn.Module() if module is None else module, checkpoint.source.folder)


def fitting(models: Models, metric: AnyMetric, data: Data) -> Data:
    """The section of a metric, with windows of a text no longer than the models take."""
    if metric.reads is not TokenLogits:
        return data
    return data.model_copy(update={"length": min([data.length, *_positions(models)])})


def read_samples(models: Models, metric: AnyMetric, data: Data) -> MetricSamples:
    """Read what a metric is measured on, and hold it against the models; their weights are not looked at.

    Raises:
        RecipeError, CheckpointError: the data cannot be read, or it does not fit the metric or the models.
    """
    raise_all([problem for each in models for problem in text_problems(each.module, data, _who(each, models))])
    return READS[metric.reads](models, metric, data)


def _who(model: Running, models: Models) -> str:
    return "the model" if model is models[0] else "the baseline"


def _require_taken(models: Models, data: Data, inputs: Inputs) -> None:
    """Refuse samples that the forward of a model does not take.

    Raises:
        RecipeError: one does not.
    """
    for model in models:
        named = getattr(model.module, "main_input_name", None) or ""
        given = inputs if isinstance(inputs, dict) else {named: inputs}
        raise_all(input_problems(model.module, given, data, _who(model, models)))


def _windows(models: Models, metric: AnyMetric, data: Data) -> Windows:
    read, source = sequences(models, data)
    _require_takes(metric, len(read.targets), data)
    if data.kind == "arrays":
        for model in models:
            raise_all(input_problems(model.module, read.inputs, data, _who(model, models)))
    if "input_ids" in read.inputs:
        _require_rows(models, int(read.inputs["input_ids"].max()))
    return Windows(source, read)


def _labelled(models: Models, metric: AnyMetric, data: Data) -> Labelled:
    tested = models[0]
    if data.kind == "arrays":
        inputs, labels, source = arrays(data)
        assert labels is not None, "a recipe of labelled data names its labels"
        _require_taken(models, data, inputs)
        batched: tuple[Inputs, ...] = tuple(torch.split(inputs, BATCH))
    else:
        texts, labels, source = labelled(data, classes=class_names(tested.module))
        length = min([data.length, *_positions(models)])  # one text for all of them
        batched = tuple(batches(texts, tested.tokenizer, BATCH, length))
        for part in batched:
            _require_taken(models, data, part)
    _require_takes(metric, len(labels), data)
    return Labelled(source, batched, labels)


def _pairs(models: Models, metric: AnyMetric, data: Data) -> Pairs:
    first, second, scores, source = pairs(data)
    _require_takes(metric, len(scores), data)
    _require_encode(models, first[:1], data.length)
    return Pairs(source, tuple(first), tuple(second), scores)


def _sentences(models: Models, metric: AnyMetric, data: Data) -> Sentences:
    texts, source = sentences(data)
    _require_takes(metric, len(texts), data)
    _require_encode(models, texts[:1], data.length)
    return Sentences(source, tuple(texts))


READS: Mapping[type[ModelOutputs], Callable[[Models, AnyMetric, Data], MetricSamples]] = {
    TokenLogits: _windows,
    ClassLogits: _labelled,
    PairEmbeddings: _pairs,
    SentenceEmbeddings: _sentences,
}


def _require_takes(metric: AnyMetric, samples: int, data: Data) -> None:
    problem = metric.check(samples, data)
    if problem is not None:
        raise RecipeError(*problem)


def _positions(models: Models) -> list[int]:
    """The most tokens that models take, of those that have a limit."""
    return [limit for model in models if (limit := most_positions(model.module)) is not None]


def _require_rows(models: Models, largest: int) -> None:
    """Look at the tables of embeddings, before a model runs."""
    tables = [getattr(model.module, "get_input_embeddings", lambda: None)() for model in models]
    require_tokens(models, [getattr(table, "num_embeddings", largest + 1) for table in tables], largest)


def require_tokens(models: Models, counts: Sequence[int], largest: int) -> None:
    """Every token must have a row in the table of every model.

    Raises:
        CheckpointError: one has fewer rows.
    """
    for model, count in zip(models, counts, strict=True):
        if count <= largest:
            raise CheckpointError(
                f"the vocabularies differ: {model.path} has {count} tokens, and the text has token {largest}",
                "compare with the checkpoint it was made from, and keep the tokenizer of each beside it",
            )


def _require_encode(models: Models, texts: Sequence[str], length: int) -> None:
    """Look for what makes embeddings of a text, in every model: a tokenizer that pads, a pooling, and states."""
    for model in models:
        (batch,) = batches(texts, model.tokenizer, 1, length)
        _ = model.pooling
        ids = {"input_ids": batch["input_ids"].to(next(model.module.parameters()).device)}
        if encodes(model) and run_error(model.module, (), ids) is not None:
            raise CheckpointError(
                f"{model.path} writes a text behind what it reads, and gives a sentence no embedding",
                "`-r eval/language-model` measures what it writes; with T5EncoderModel or its like as `architectures` "
                "in config.json the encoder is measured alone",
            )
