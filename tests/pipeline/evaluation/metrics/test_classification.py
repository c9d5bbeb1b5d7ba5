from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from aicompress.errors import CheckpointError, RecipeError
from aicompress.pipeline.evaluation.metrics.classification import Labelled, classification_figures


def labelled(inputs: torch.Tensor, labels: torch.Tensor, batch: int = 7) -> Labelled:
    return Labelled(lambda: inputs.split(batch), labels, "samples")


def sign_classifier(weight: list[list[float]]) -> torch.nn.Linear:
    model = torch.nn.Linear(2, len(weight), bias=False)
    model.weight = torch.nn.Parameter(torch.tensor(weight))
    return model


INPUTS = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 4)


def test_accuracy_counts_right_answers() -> None:
    labels = torch.tensor([0] * 5 + [1] + [1] * 3 + [0])  # the identity is right 8 times out of 10
    (figures,) = classification_figures(sign_classifier([[1.0, 0.0], [0.0, 1.0]]), [], labelled(INPUTS, labels))
    assert figures["accuracy"].value == 0.8
    assert (figures["accuracy"].low, figures["accuracy"].high) == pytest.approx((0.443905, 0.974789), abs=1e-6)
    assert figures["accuracy"].n == 10


def test_agreement_with_a_baseline() -> None:
    identity = sign_classifier([[1.0, 0.0], [0.0, 1.0]])
    always_first = sign_classifier([[1.0, 1.0], [0.0, 0.0]])
    labels = torch.tensor([0] * 6 + [1] * 4)
    same, other = classification_figures(identity, [identity, always_first], labelled(INPUTS, labels))
    assert same["prediction_agreement"].value == 1.0
    assert other["prediction_agreement"].value == 0.6
    assert other["accuracy"].value == 1.0
    assert other["accuracy"].baseline == 0.6


def test_an_image_classifier_of_transformers(tiny_vit: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(tiny_vit)
    images = torch.rand(12, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixel_values=images.unsqueeze(1)).logits.argmax(-1)
    (figures,) = classification_figures(model, [], labelled(images, expected))
    assert figures["accuracy"].value == 1.0


def test_labels_must_be_classes_of_the_model() -> None:
    with pytest.raises(RecipeError, match="from 0 to 5, the model has 2 classes"):
        classification_figures(sign_classifier([[1.0, 0.0], [0.0, 1.0]]), [], labelled(INPUTS, torch.arange(10) % 6))


def test_an_output_that_is_no_class_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not \\(samples, classes\\)"):
        classification_figures(torch.nn.Flatten(0), [], labelled(INPUTS, torch.zeros(10, dtype=torch.int64)))
