"""Run models on the samples of a recipe's section: the outputs that metrics read, all models in turn on each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.data import Data, Source, arrays, batches, labelled, pairs, sentences, token_windows
from aicompress.errors import CheckpointError, RecipeError
from aicompress.metrics import Metric
from aicompress.metrics.outputs import ClassLogits, Outputs, PairEmbeddings, SentenceEmbeddings, TokenLogits
from aicompress.model.blocks.input_errors import input_errors_refused
from aicompress.model.loading.config import class_names, most_positions
from aicompress.pipeline.step.running_model import Inputs, Running, encoder

LOGITS = 1 << 24  # logits of one model that are held at a time: 64 MiB in float32
BATCH = 64  # samples that a classifier sees at once
Models = Sequence[Running]  # the tested one, then its baselines
AnyMetric = Metric[Any, Any]
Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Watcher:
    """Who is told of a metric's samples, and of how far it is.

    Attributes:
        read: called with the record of the samples.
        progress: called with (done, total).
    """

    read: Callable[[Source], None] = lambda source: None
    progress: Progress = lambda done, total: None


def model_outputs(models: Models, metric: AnyMetric, data: Data, watcher: Watcher = Watcher()) -> Iterator[Any]:
    """Give the outputs that a metric reads, of all models, in batches.

    Args:
        models: the tested one, then its baselines.
        data: the samples.
        watcher: told of the samples and of progress.

    Raises:
        RecipeError, CheckpointError: data or models do not fit what is asked.
    """
    return RUNS[metric.reads](models, metric, data, watcher)


def token_logits(models: Models, metric: AnyMetric, data: Data, watcher: Watcher) -> Iterator[TokenLogits]:
    """Give logits for every window; one batch of logits per model is held."""
    windows, source = token_windows(data, models[0].tokenizer)
    watcher.read(source)
    _require_positions(models, data.length)
    _require_same_tokens(models, data, windows)
    _require_takes(metric, len(windows), data)
    runs = [_language_model(model.module, metric.name) for model in models]
    _require_rows(models, int(windows.max()))
    start = 0
    width = 1  # the first window tells the size of the vocabulary
    while start < len(windows):
        ids = windows[start : start + width]
        tested = runs[0](ids)
        logits = [tested, *(run(ids).to(tested.device) for run in runs[1:])]
        shared = min(each.shape[-1] for each in logits)  # tables of one tokenizer may be padded to other sizes
        _require_tokens(models, [each.shape[-1] for each in logits], int(windows.max()))
        yield TokenLogits(ids.to(tested.device), tuple(each[..., :shared] for each in logits))
        start += len(ids)
        watcher.progress(start, len(windows))
        width = max(1, LOGITS // (windows.shape[1] * tested.shape[-1]))


def class_logits(models: Models, metric: AnyMetric, data: Data, watcher: Watcher) -> Iterator[ClassLogits]:
    """Give logits for every sample of known class."""
    inputs, labels, source = _labelled(models[0], data)
    watcher.read(source)
    unit = "samples" if data.kind == "arrays" else "texts"
    _require_takes(metric, len(labels), data)
    watcher.progress(0, len(labels))
    runs = [_classifier(model.module, metric.name) for model in models]
    start = 0
    for batch in inputs:
        logits = tuple(run(batch) for run in runs)
        for each in logits:
            _require_classes(each, labels, metric.name)
        yield ClassLogits(labels[start : start + len(logits[0])], logits, unit)
        start += len(logits[0])
        watcher.progress(start, len(labels))


def pair_embeddings(models: Models, metric: AnyMetric, data: Data, watcher: Watcher) -> Iterator[PairEmbeddings]:
    """Give embeddings of all pairs; a sentence that stands in several pairs is encoded once."""
    first, second, scores, source = pairs(data)
    watcher.read(source)
    _require_takes(metric, len(scores), data)
    texts = sorted({*first, *second})
    row = {text: number for number, text in enumerate(texts)}
    one, other = (torch.tensor([row[text] for text in side]) for side in (first, second))
    yield PairEmbeddings(scores, one, other, _encoded(models, texts, data.length, watcher.progress))


def sentence_embeddings(
    models: Models, metric: AnyMetric, data: Data, watcher: Watcher
) -> Iterator[SentenceEmbeddings]:
    """Give embeddings of all sentences."""
    texts, source = sentences(data)
    watcher.read(source)
    _require_takes(metric, len(texts), data)
    yield SentenceEmbeddings(_encoded(models, texts, data.length, watcher.progress))


RUNS: Mapping[type[Outputs], Callable[[Models, AnyMetric, Data, Watcher], Iterator[Outputs]]] = {
    TokenLogits: token_logits,
    ClassLogits: class_logits,
    PairEmbeddings: pair_embeddings,
    SentenceEmbeddings: sentence_embeddings,
}


def _require_takes(metric: AnyMetric, samples: int, data: Data) -> None:
    problem = metric.check(samples, data)
    if problem is not None:
        raise RecipeError(*problem)


def _require_positions(models: Models, length: int) -> None:
    limits = [limit for model in models if (limit := most_positions(model.module)) is not None]
    if limits and length > min(limits):
        raise RecipeError(
            f"windows of {length} tokens are longer than the model's {min(limits)} positions",
            f"length: {min(limits)}",
        )


def _require_same_tokens(models: Models, data: Data, windows: Tensor) -> None:
    for baseline in models[1:]:
        theirs, _ = token_windows(data, baseline.tokenizer)
        if not torch.equal(windows, theirs):
            raise CheckpointError(
                f"{baseline.path} divides the text into other tokens than {models[0].path}",
                "compare checkpoints that share a tokenizer",
            )


def _language_model(model: nn.Module, metric: str) -> Callable[[Tensor], Tensor]:
    """Make a function of a causal language model: ids (batch, tokens) -> logits (batch, tokens, vocabulary)."""
    device = next(model.parameters()).device

    def run(ids: Tensor) -> Tensor:
        with input_errors_refused("evaluation text"):
            output = model(input_ids=ids.to(device), use_cache=False)
        logits = getattr(output, "logits", None)
        if logits is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
            kind = type(model).__name__
            raise CheckpointError(
                f"{kind} gives no logits for every token", f"{metric} is measured on causal language models"
            )
        return logits  # type: ignore[no-any-return]

    return run


def _require_rows(models: Models, largest: int) -> None:
    """Look at the tables of embeddings, before a model runs."""
    tables = [getattr(model.module, "get_input_embeddings", lambda: None)() for model in models]
    _require_tokens(models, [getattr(table, "num_embeddings", largest + 1) for table in tables], largest)


def _require_tokens(models: Models, counts: Sequence[int], largest: int) -> None:
    """Every token must have a row in the table of every model.

    Raises:
        CheckpointError: one has fewer rows.
    """
    for model, count in zip(models, counts, strict=True):
        if count <= largest:
            raise CheckpointError(
                f"the vocabularies differ: {model.path} has {count} tokens, and the text has token {largest}",
                "compare with the checkpoint it was made from",
            )


def _labelled(tested: Running, data: Data) -> tuple[Iterable[Inputs], Tensor, Source]:
    """Read batches of inputs, labels (samples,) int64, and the record."""
    if data.kind == "arrays":
        inputs, named, source = arrays(data)
        assert named is not None, "a recipe of labelled data names its labels"
        return torch.split(inputs, BATCH), named, source
    texts, labels, source = labelled(data, classes=class_names(tested.module))
    length = min(data.length, most_positions(tested.module) or data.length)
    return batches(texts, tested.tokenizer, BATCH, length), labels, source


def _classifier(model: nn.Module, metric: str) -> Callable[[Inputs], Tensor]:
    """Make a function of a classifier, of transformers or called on arrays: inputs -> logits (batch, classes)."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    named = getattr(model, "main_input_name", None)

    def run(inputs: Inputs) -> Tensor:
        with input_errors_refused("evaluation inputs"):
            if isinstance(inputs, dict):
                output = model(**{name: value.to(device) for name, value in inputs.items()})
            elif named is not None:
                if named == "pixel_values" and inputs.ndim == 3:
                    inputs = inputs.unsqueeze(1)  # (samples, height, width): one channel
                output = model(**{named: inputs.to(device)})
            else:
                output = model(inputs.to(device))
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None:
            raise CheckpointError(f"{type(model).__name__} gives no logits", f"{metric} is measured on classifiers")
        return logits.float()

    return run


def _require_classes(logits: Tensor, labels: Tensor, metric: str) -> None:
    if logits.ndim != 2:
        raise CheckpointError(
            f"the model's output is {tuple(logits.shape)}, not (samples, classes)",
            f"{metric} is measured on classifiers",
        )
    low, high = int(labels.min()), int(labels.max())
    if high >= logits.shape[1] or low < 0:
        raise RecipeError(
            f"labels go from {low} to {high}, the model has {logits.shape[1]} classes", "check the name of the labels"
        )


def _encoded(models: Models, texts: Sequence[str], length: int, progress: Progress) -> tuple[Tensor, ...]:
    """Encode texts with each model: embeddings (texts, width)."""
    embeddings: list[Tensor] = []
    for model in models:
        progress(len(embeddings), len(models))
        embeddings.append(encoder(model, length)(texts))
    return tuple(embeddings)
