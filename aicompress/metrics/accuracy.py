"""Accuracy: how often a classifier gives the right class, and how often the baseline's class."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from aicompress.data.section import Data
from aicompress.metrics.intervals import proportion, share
from aicompress.metrics.metric import FigureSpec, MeasuredFigures, Metric
from aicompress.metrics.outputs import ClassLogits


def measure(batches: Iterable[ClassLogits], config: Data, seed: int) -> MeasuredFigures:
    """Measure the accuracy of each model, and per baseline the share of samples that both give the same class."""
    labels: list[Tensor] = []
    classes: list[tuple[Tensor, ...]] = []  # of each batch: the class that each model gives, (samples,)
    unit = ""
    for batch in batches:
        labels.append(batch.labels)
        classes.append(tuple(logits.argmax(-1).cpu() for logits in batch.logits))
        unit = batch.unit
    right = torch.cat(labels)
    tested, *baselines = (torch.cat(answers) for answers in zip(*classes, strict=True))
    count = len(right)
    return MeasuredFigures(
        tuple({"accuracy": share(each == right, unit)} for each in (tested, *baselines)),
        tuple({"prediction_agreement": proportion(int((b == tested).sum()), count, unit)} for b in baselines),
    )


METRIC = Metric(
    "accuracy", "classifiers: labelled arrays, or rows of texts with `labels`", Data, reads=ClassLogits,
    figures=(FigureSpec("accuracy", "higher"), FigureSpec("prediction_agreement", "higher", compared=True)),
    measure=measure,
)  # fmt: skip
