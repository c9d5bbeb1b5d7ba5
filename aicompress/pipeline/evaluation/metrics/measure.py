"""What an eval recipe asks for, measured on running models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from aicompress.data import Data, arrays, batches, labelled, pairs, sentences, token_windows
from aicompress.errors import CheckpointError, RecipeError
from aicompress.pipeline.evaluation.metrics.classification import Labelled, classification_figures
from aicompress.pipeline.evaluation.metrics.intervals import Estimate
from aicompress.pipeline.evaluation.metrics.language import language_figures
from aicompress.pipeline.evaluation.metrics.sentences import embedding_figures, similarity_figures
from aicompress.pipeline.step.running_model import Inputs, Running, encoder
from aicompress.recipe.evaluation import EvalRecipe

BATCH = 64  # samples that a classifier sees at once
PAIRED = 2000  # sentences of which all pairs are compared
Progress = Callable[[str, int, int], None]  # what, done, total
Figures = list[dict[str, Estimate]]


def measure_quality(
    models: Sequence[Running], recipe: EvalRecipe, progress: Progress = lambda what, done, total: None
) -> dict[str, Any]:
    """Every figure that the recipe asks for.

    Args:
        models: the tested one, then its baselines.
        recipe: what to measure.
        progress: called with (what, done, total).

    Returns:
        Figures by name as the report stores them; those against further baselines under `against`, by path.

    Raises:
        RecipeError, CheckpointError: data or models do not fit what is asked.
    """
    asked = recipe.quality
    merged: Figures = [{} for _ in models[1:]] or [{}]
    for data, measure in (
        (asked.perplexity, _perplexity),
        (asked.accuracy, _accuracy),
        (asked.similarity, _similarity),
        (asked.embedding, _embedding),
    ):
        if data is not None:
            for into, figures in zip(merged, measure(models, data, recipe.seed, progress), strict=False):
                into.update(figures)
    plain = [{name: estimate.plain() for name, estimate in figures.items()} for figures in merged]
    found: dict[str, Any] = dict(plain[0])
    if len(plain) > 1:
        found["against"] = {model.path: figures for model, figures in zip(models[2:], plain[1:], strict=True)}
    return found


def _perplexity(models: Sequence[Running], data: Any, seed: int, progress: Progress) -> Figures:
    windows, _ = token_windows(data, models[0].tokenizer)
    limit = min(_positions(model) for model in models)
    if data.length > limit:
        raise RecipeError(
            f"windows of {data.length} tokens are longer than the model's {limit} positions", f"length: {limit}"
        )
    for base in models[1:]:
        theirs, _ = token_windows(data, base.tokenizer)
        if not torch.equal(windows, theirs):
            raise CheckpointError(
                f"{base.path} divides the text into other tokens than {models[0].path}",
                "compare checkpoints that share a tokenizer",
            )
    modules = [model.module for model in models]
    return language_figures(modules[0], modules[1:], windows, data.kl_samples, seed, progress)


def _positions(model: Running) -> int:
    config: Any = getattr(model.module, "config", None)
    return getattr(config, "max_position_embeddings", None) or 1 << 31


def _accuracy(models: Sequence[Running], data: Data, seed: int, progress: Progress) -> Figures:
    progress("accuracy", 0, 1)
    modules = [model.module for model in models]
    if data.kind == "arrays":
        inputs, labels, _ = arrays(data)
        assert labels is not None
        samples = Labelled(lambda: torch.split(inputs, BATCH), labels, "samples")
        return classification_figures(modules[0], modules[1:], samples)
    config: Any = getattr(modules[0], "config", None)
    names = getattr(config, "id2label", None) or {}
    texts, labels, _ = labelled(data, classes=[names[number] for number in sorted(names)])

    def encoded() -> Iterator[Inputs]:
        yield from batches(texts, models[0].tokenizer, BATCH, data.length)

    return classification_figures(modules[0], modules[1:], Labelled(encoded, labels, "texts"))


def _similarity(models: Sequence[Running], data: Data, seed: int, progress: Progress) -> Figures:
    progress("similarity", 0, 1)
    first, second, scores, _ = pairs(data)
    encode, *others = [encoder(model, data.length) for model in models]
    return similarity_figures(encode, others, first, second, scores)


def _embedding(models: Sequence[Running], data: Data, seed: int, progress: Progress) -> Figures:
    progress("embeddings", 0, 1)
    texts, _ = sentences(data)
    if len(texts) > PAIRED:
        raise RecipeError(
            f"quality.embedding compares all pairs of sentences, {len(texts)} are too many", f"samples: {PAIRED}"
        )
    encode, *others = [encoder(model, data.length) for model in models]
    return embedding_figures(encode, others, texts, seed)
