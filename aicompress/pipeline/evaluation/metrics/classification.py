"""Classifiers: how often the right class is given, and how often the baseline's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aicompress.errors import CheckpointError, RecipeError
from aicompress.model.blocks.input_errors import accepting
from aicompress.pipeline.evaluation.metrics.intervals import Estimate, proportion

Inputs = Tensor | dict[str, Tensor]
Classify = Callable[[Inputs], Tensor]  # a batch -> logits (batch, classes)


@dataclass(frozen=True)
class Labelled:
    """Samples with their classes.

    Attributes:
        batches: how to go through the samples once more, in order, for each model.
        labels: (samples,) int64.
        unit: what a sample is, for the report: "images", "texts".
    """

    batches: Callable[[], Iterable[Inputs]]
    labels: Tensor
    unit: str


def classification_figures(
    model: nn.Module, baselines: Sequence[nn.Module], data: Labelled
) -> list[dict[str, Estimate]]:
    """Accuracy, and per baseline the share of samples that both models give the same class.

    Returns:
        Figures against each baseline; one entry, accuracy alone, where there is none.

    Raises:
        CheckpointError: a model gives no logits over classes.
        RecipeError: a label is none of the model's classes.
    """
    answers = [predictions(each, data) for each in (model, *baselines)]
    scores = [proportion(int((answer == data.labels).sum()), len(data.labels), data.unit) for answer in answers]
    found = []
    for answer, score in zip(answers[1:], scores[1:], strict=True):
        same = proportion(int((answer == answers[0]).sum()), len(data.labels), data.unit)
        found.append({"accuracy": scores[0].beside(score), "prediction_agreement": same})
    return found or [{"accuracy": scores[0]}]


@torch.inference_mode()
def predictions(model: nn.Module, data: Labelled) -> Tensor:
    """The class that a model gives each sample, (samples,) int64."""
    run = classifier(model)
    found: list[Tensor] = []
    for inputs in data.batches():
        logits = run(inputs)
        if logits.ndim != 2:
            raise CheckpointError(
                f"the model's output is {tuple(logits.shape)}, not (samples, classes)",
                "accuracy is measured on classifiers",
            )
        if int(data.labels.max()) >= logits.shape[1] or int(data.labels.min()) < 0:
            raise RecipeError(
                f"labels go from {int(data.labels.min())} to {int(data.labels.max())}, "
                f"the model has {logits.shape[1]} classes",
                "check the name of the labels",
            )
        found.append(logits.argmax(-1).cpu())
    return torch.cat(found)


def classifier(model: nn.Module) -> Classify:
    """Logits of a module of any kind: a transformers classifier, or a module that is called on arrays."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    named = getattr(model, "main_input_name", None)

    def run(inputs: Inputs) -> Tensor:
        with accepting("evaluation inputs"):
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
            raise CheckpointError(f"{type(model).__name__} gives no logits", "accuracy is measured on classifiers")
        return logits.float()

    return run
