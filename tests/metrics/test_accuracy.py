"""Accuracy and prediction agreement from the logits of classifiers."""

from collections.abc import Sequence

import pytest
import torch

from aicompress.data import Data
from aicompress.metrics import MeasuredFigures
from aicompress.metrics.accuracy import METRIC
from aicompress.metrics.outputs import ClassLogits

INPUTS = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 4)
IDENTITY = torch.eye(2)
ALWAYS_FIRST = torch.tensor([[1.0, 1.0], [0.0, 0.0]])


def measured(weights: Sequence[torch.Tensor], labels: torch.Tensor, batch: int = 7) -> MeasuredFigures:
    parts = zip(INPUTS.split(batch), labels.split(batch), strict=True)
    batches = [ClassLogits(right, tuple(x @ weight.t() for weight in weights), "images") for x, right in parts]
    return METRIC.measure(batches, Data(arrays="unread.npz", inputs="x", labels="y"), 0)


def test_accuracy_counts_right_answers() -> None:
    labels = torch.tensor([0] * 5 + [1] + [1] * 3 + [0])  # the identity is right 8 times out of 10
    figures = measured([IDENTITY], labels)
    accuracy = figures.alone[0]["accuracy"]
    assert accuracy.value == 0.8
    assert (accuracy.low, accuracy.high) == pytest.approx((0.443905, 0.974789), abs=1e-6)
    assert (accuracy.n, accuracy.unit) == (10, "images")
    assert figures.against == ()


def test_agreement_with_a_baseline() -> None:
    labels = torch.tensor([0] * 6 + [1] * 4)
    figures = measured([IDENTITY, IDENTITY, ALWAYS_FIRST], labels)
    same, other = figures.against
    assert same["prediction_agreement"].value == 1.0
    assert other["prediction_agreement"].value == 0.6
    assert other["prediction_agreement"].n == 10
    assert [alone["accuracy"].value for alone in figures.alone] == [1.0, 1.0, 0.6]
