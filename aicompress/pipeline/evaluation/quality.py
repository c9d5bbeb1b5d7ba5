"""Measure what an eval recipe asks for, on running models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.data import Data
from aicompress.errors import CheckpointError, RecipeError
from aicompress.measure import Counted
from aicompress.metrics.outputs import ClassLogits, ModelOutputs, PairEmbeddings, SentenceEmbeddings, TokenLogits
from aicompress.model.blocks.input_errors import input_errors_refused
from aicompress.model.channels.graph import forward
from aicompress.pipeline.evaluation.samples import (
    AnyMetric,
    Labelled,
    MetricSamples,
    Models,
    Pairs,
    Sentences,
    Windows,
    fitting,
    read_samples,
    require_tokens,
)
from aicompress.pipeline.evaluation.sequences import Sequences, encodes, unmasks
from aicompress.pipeline.step.models.accepted_inputs import as_taken
from aicompress.pipeline.step.models.running_model import Inputs, Running, encoder, placed
from aicompress.pipeline.step.options import Progress
from aicompress.recipe.evaluation import EvalRecipe

FEW = 4  # tokens, of which each sees much of each other, where it sees it
ROUNDING = 2e-2  # of logits of the same tokens beside another one, such as in experts' products
LOGITS = 1 << 24  # logits of one model that are held at a time: 64 MiB in float32


def model_outputs(
    models: Models, metric: AnyMetric, data: Data, samples: MetricSamples, progress: Counted = lambda done, total: None
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
    models: Models, metric: AnyMetric, data: Data, samples: Windows, progress: Counted
) -> Iterator[TokenLogits]:
    """Give logits for every window; one batch of logits per model is held."""
    count, length = samples.read.targets.shape
    runs = [_language_model(model, metric.name) for model in models]
    if not encodes(models[0]) and not unmasks(models[0]):
        _require_causal(models[0], runs[0], samples.read.part(0, 1))
    start = 0
    width = 1  # the first window tells the size of the vocabulary
    while start < count:
        part = samples.read.part(start, width)
        tested = runs[0](part)
        logits = [tested, *(run(part).to(tested.device) for run in runs[1:])]
        shared = min(each.shape[-1] for each in logits)  # tables of one tokenizer may be padded to other sizes
        require_tokens(models, [each.shape[-1] for each in logits], int(samples.read.targets.max()))
        yield TokenLogits(part.targets.to(tested.device), tuple(each[..., :shared] for each in logits))
        start += len(part.targets)
        progress(start, count)
        width = max(1, LOGITS // (length * tested.shape[-1]))


def class_logits(
    models: Models, metric: AnyMetric, data: Data, samples: Labelled, progress: Counted
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
    models: Models, metric: AnyMetric, data: Data, samples: Pairs, progress: Counted
) -> Iterator[PairEmbeddings]:
    """Give embeddings of all pairs; a sentence that stands in several pairs is encoded once."""
    texts = sorted({*samples.first, *samples.second})
    row = {text: number for number, text in enumerate(texts)}
    one, other = (torch.tensor([row[text] for text in side]) for side in (samples.first, samples.second))
    yield PairEmbeddings(samples.scores, one, other, _encoded(models, texts, data.length, progress))


def sentence_embeddings(
    models: Models, metric: AnyMetric, data: Data, samples: Sentences, progress: Counted
) -> Iterator[SentenceEmbeddings]:
    """Give embeddings of all sentences."""
    yield SentenceEmbeddings(_encoded(models, samples.texts, data.length, progress))


RUNS: Mapping[type[ModelOutputs], Callable[[Models, AnyMetric, Data, Any, Counted], Iterator[ModelOutputs]]] = {
    TokenLogits: token_logits,
    ClassLogits: class_logits,
    PairEmbeddings: pair_embeddings,
    SentenceEmbeddings: sentence_embeddings,
}


def _language_model(model: Running, metric: str) -> Callable[[Sequences], Tensor]:
    """Make a function of a language model: what it is given -> logits of the targets (batch, tokens, vocabulary)."""
    module, forced = model.module, encodes(model)
    ahead = not forced and not unmasks(model)  # position t predicts token t + 1
    device = next(module.parameters()).device

    def run(given: Sequences) -> Tensor:
        # The model itself puts its first token before labels and gives the decoder all but the last: teacher forcing.
        inputs = given.inputs | ({"labels": given.targets} if forced else {})
        with input_errors_refused("evaluation text"):
            output = module(**{name: each.to(device) for name, each in inputs.items()}, use_cache=False)
        logits = getattr(output, "logits", None)
        expected = given.inputs["input_ids"].shape if ahead else given.targets.shape
        if logits is None or logits.ndim != 3 or logits.shape[:2] != expected:
            kind = type(module).__name__
            raise CheckpointError(f"{kind} gives no logits for every token", f"{metric} is measured on language models")
        return logits[:, :-1] if ahead else logits  # type: ignore[no-any-return]

    return run


def _require_causal(model: Running, run: Callable[[Sequences], Tensor], window: Sequences) -> None:
    """Refuse a model that is given the tokens which it predicts, as XLNet or a BERT that is no decoder.

    Raises:
        CheckpointError: what it gives for the tokens before the last one changes with that one.
    """
    first = window.inputs["input_ids"][:, :FEW]
    other = first.clone()
    other[:, -1] = (first[:, -1] + 1) % (first.max() + 1)  # of the same vocabulary
    expected, given = (run(Sequences({"input_ids": ids}, ids[:, 1:])).float() for ids in (first, other))
    if float((given - expected).norm()) > ROUNDING * float(expected.norm()):
        raise CheckpointError(
            f"{model.path}: a {type(model.module).__name__} sees the tokens that it is to predict",
            "perplexity is measured on models that read from left to right, and on masked language models",
        )


def _classifier(model: nn.Module, metric: str) -> Callable[[Inputs], Tensor]:
    """Make a function of a classifier, of transformers or called on arrays: inputs -> logits (batch, classes)."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def run(inputs: Inputs) -> Tensor:
        given = inputs if isinstance(inputs, dict) else as_taken(model, inputs)
        with input_errors_refused("evaluation inputs"):
            output = forward(model, placed(given, device))
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


def _encoded(models: Models, texts: Sequence[str], length: int, progress: Counted) -> tuple[Tensor, ...]:
    """Encode texts with each model: embeddings (texts, width)."""
    embeddings: list[Tensor] = []
    for model in models:
        progress(len(embeddings), len(models))
        with input_errors_refused("evaluation text"):
            embeddings.append(encoder(model, length)(texts))
    return tuple(embeddings)


Asked = Sequence[tuple[AnyMetric, Data, MetricSamples]]  # metrics with their sections, and what they are measured on


def asked_quality(recipe: EvalRecipe, models: Sequence[Running]) -> Asked:
    """The metrics of a recipe with their samples, read for models whose weights are not needed.

    Raises:
        RecipeError, CheckpointError: data or models do not fit what is asked.
    """
    fitted = [(metric, fitting(models, metric, data)) for metric, data in recipe.quality.asked]
    return [(metric, data, read_samples(models, metric, data)) for metric, data in fitted]


def shortened(recipe: EvalRecipe, asked: Asked) -> Iterator[str]:
    """A warning for each metric whose samples are shorter than the recipe asks, for the models take no more."""
    for (metric, data), (_, fitted, _) in zip(recipe.quality.asked, asked, strict=True):
        if fitted.length < data.length:
            yield (
                f"{metric.name}: samples are {fitted.length} tokens long, not {data.length}: the model takes no more"
            )


@torch.inference_mode()
def measure_quality(
    models: Sequence[Running], asked: Asked, seed: int, progress: Progress = lambda what, done, total: None
) -> dict[str, Any]:
    """Measure every figure that is asked for.

    Args:
        models: the tested one, then its baselines.
        asked: what to measure, and on which samples.
        seed: for resampling.
        progress: called with (what, done, total).

    Returns:
        Figures by name as the report stores them, each with the kernels that the tested model ran on and, where it is
        held against a baseline, those of that; figures against further baselines under `against`, by path.

    Raises:
        RecipeError, CheckpointError: the models do not give what is asked.
    """
    against: list[dict[str, Any]] = [{} for _ in models[1:]] or [{}]
    ran = [{"kernels": models[0].kernels, "baseline_kernels": model.kernels} for model in models[1:]]
    ran = ran or [{"kernels": models[0].kernels}]
    for number, (metric, data, samples) in enumerate(asked):
        outputs = model_outputs(models, metric, data, samples, _share(progress, metric.name, number, len(asked)))
        measured = metric.measure(outputs, data, seed)
        for figures, entries, named in zip(against, metric.entries(measured), ran, strict=True):
            figures.update({name: {**entry, **named} for name, entry in entries.items()})
    quality = dict(against[0])
    if len(against) > 1:
        quality["against"] = {model.path: figures for model, figures in zip(models[2:], against[1:], strict=True)}
    return quality


def _share(progress: Progress, what: str, number: int, of: int) -> Counted:
    """Report the progress of one metric as a share of the whole."""
    return lambda done, total: progress(what, number * total + done, of * total)
