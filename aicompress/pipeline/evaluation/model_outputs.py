"""Run models on the samples of a recipe's section: the outputs that metrics read, all models in turn on each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.data import Data
from aicompress.errors import CheckpointError, RecipeError
from aicompress.metrics.outputs import ClassLogits, ModelOutputs, PairEmbeddings, SentenceEmbeddings, TokenLogits
from aicompress.model.blocks.input_errors import input_errors_refused
from aicompress.pipeline.evaluation.samples import (
    AnyMetric,
    Labelled,
    MetricSamples,
    Models,
    Pairs,
    Sentences,
    Windows,
    require_tokens,
)
from aicompress.pipeline.step.models.running_model import Inputs, encoder

LOGITS = 1 << 24  # logits of one model that are held at a time: 64 MiB in float32
Progress = Callable[[int, int], None]  # done, total


def model_outputs(
    models: Models, metric: AnyMetric, data: Data, samples: MetricSamples, progress: Progress = lambda done, total: None
) -> Iterator[Any]:
    """Give the outputs that a metric reads, of all models, in batches.

    Args:
        models: the tested one, then its baselines.
        data: the section that the samples were read from.
        samples: as `read_samples` gives them.
        progress: called with (done, total).

    Raises:
        RecipeError, CheckpointError: the models do not give what is asked.
    """
    return RUNS[metric.reads](models, metric, data, samples, progress)


def token_logits(
    models: Models, metric: AnyMetric, data: Data, samples: Windows, progress: Progress
) -> Iterator[TokenLogits]:
    """Give logits for every window; one batch of logits per model is held."""
    windows = samples.ids
    runs = [_language_model(model.module, metric.name) for model in models]
    start = 0
    width = 1  # the first window tells the size of the vocabulary
    while start < len(windows):
        ids = windows[start : start + width]
        tested = runs[0](ids)
        logits = [tested, *(run(ids).to(tested.device) for run in runs[1:])]
        shared = min(each.shape[-1] for each in logits)  # tables of one tokenizer may be padded to other sizes
        require_tokens(models, [each.shape[-1] for each in logits], int(windows.max()))
        yield TokenLogits(ids.to(tested.device), tuple(each[..., :shared] for each in logits))
        start += len(ids)
        progress(start, len(windows))
        width = max(1, LOGITS // (windows.shape[1] * tested.shape[-1]))


def class_logits(
    models: Models, metric: AnyMetric, data: Data, samples: Labelled, progress: Progress
) -> Iterator[ClassLogits]:
    """Give logits for every sample of known class."""
    labels = samples.labels
    unit = "samples" if data.kind == "arrays" else "texts"
    progress(0, len(labels))
    runs = [_classifier(model.module, metric.name) for model in models]
    start = 0
    for batch in samples.inputs:
        logits = tuple(run(batch) for run in runs)
        for each in logits:
            _require_classes(each, labels, metric.name)
        yield ClassLogits(labels[start : start + len(logits[0])], logits, unit)
        start += len(logits[0])
        progress(start, len(labels))


def pair_embeddings(
    models: Models, metric: AnyMetric, data: Data, samples: Pairs, progress: Progress
) -> Iterator[PairEmbeddings]:
    """Give embeddings of all pairs; a sentence that stands in several pairs is encoded once."""
    texts = sorted({*samples.first, *samples.second})
    row = {text: number for number, text in enumerate(texts)}
    one, other = (torch.tensor([row[text] for text in side]) for side in (samples.first, samples.second))
    yield PairEmbeddings(samples.scores, one, other, _encoded(models, texts, data.length, progress))


def sentence_embeddings(
    models: Models, metric: AnyMetric, data: Data, samples: Sentences, progress: Progress
) -> Iterator[SentenceEmbeddings]:
    """Give embeddings of all sentences."""
    yield SentenceEmbeddings(_encoded(models, samples.texts, data.length, progress))


RUNS: Mapping[type[ModelOutputs], Callable[[Models, AnyMetric, Data, Any, Progress], Iterator[ModelOutputs]]] = {
    TokenLogits: token_logits,
    ClassLogits: class_logits,
    PairEmbeddings: pair_embeddings,
    SentenceEmbeddings: sentence_embeddings,
}


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
        with input_errors_refused("evaluation text"):
            embeddings.append(encoder(model, length)(texts))
    return tuple(embeddings)
