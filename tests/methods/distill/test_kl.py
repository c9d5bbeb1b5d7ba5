"""Softened Kullback-Leibler divergence against cases computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from aicompress.methods.distill import signals
from aicompress.methods.distill.kl import METHOD, ROWS, Config, known_kl, softened_kl
from aicompress.methods.outputs import Outputs, OutputShapes

LOG3 = math.log(3.0)


def test_two_classes_by_hand() -> None:
    # teacher (3/4, 1/4), student (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2)
    divergence = softened_kl(torch.zeros(1, 2), torch.tensor([[LOG3, 0.0]]), temperature=1.0)
    assert float(divergence) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_temperature_softens_and_squares() -> None:
    # logits 2 log 3 at T = 2 are log 3 at T = 1, times T² = 4
    hot = softened_kl(torch.zeros(1, 2), torch.tensor([[2 * LOG3, 0.0]]), temperature=2.0)
    cold = softened_kl(torch.zeros(1, 2), torch.tensor([[LOG3, 0.0]]), temperature=1.0)
    assert float(hot) == pytest.approx(4 * float(cold))


def test_the_mean_is_over_positions() -> None:
    student, teacher = torch.zeros(1, 2), torch.tensor([[LOG3, 0.0]])
    once = softened_kl(student, teacher, 1.0)
    twice = softened_kl(student.expand(2, 2), teacher.expand(2, 2), 1.0)
    assert float(once) == pytest.approx(float(twice))


def test_gradient_at_temperature_one_is_the_difference_of_probabilities() -> None:
    # Hinton 2015, equation 2
    student = torch.tensor([[0.3, -0.2, 1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, -1.0]])
    softened_kl(student, teacher, 1.0).backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))


def test_labels_take_the_share_that_alpha_leaves() -> None:
    outputs = Outputs(logits=torch.zeros(1, 2), labels=torch.tensor([0]))
    teacher = Outputs(logits=torch.tensor([[LOG3, 0.0]]))
    alone = float(METHOD.loss(outputs, teacher, Config(temperature=1.0, alpha=1.0)))
    mixed = float(METHOD.loss(outputs, teacher, Config(temperature=1.0, alpha=0.25)))
    assert mixed == pytest.approx(0.25 * alone + 0.75 * math.log(2.0))


def test_a_student_of_another_vocabulary_is_refused() -> None:
    message, _ = METHOD.check(OutputShapes(classes=100), OutputShapes(classes=120), Config()) or ("", "")
    assert "100" in message
    assert "120" in message


def test_labels_that_are_not_there_are_refused() -> None:
    assert METHOD.check(OutputShapes(classes=2), OutputShapes(classes=2), Config(alpha=0.5)) is not None
    assert METHOD.check(OutputShapes(classes=2, labels=True), OutputShapes(classes=2), Config(alpha=0.5)) is None


def test_models_without_logits_are_refused() -> None:
    assert METHOD.check(OutputShapes(width=8), OutputShapes(classes=2), Config()) is not None


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("form", ["top", "drawn"])
def test_from_classes_that_are_known_it_is_that_of_logits_which_fit_them(
    form: signals.Form, temperature: float
) -> None:
    draws = torch.Generator().manual_seed(0)
    logits, start = (2 * torch.randn(2 * ROWS + 3, 40, generator=draws) for _ in range(2))
    stored = signals.stored_logits(form, logits, 6, temperature, draws)
    known = signals.outputs_of(form, stored, 40, temperature).known_classes
    assert known is not None
    ours, theirs = (start.clone().requires_grad_(True) for _ in range(2))
    values = [known_kl(ours, known), softened_kl(theirs, signals.completed(known, start), temperature)]
    for value in values:
        (3 * value).backward()
    assert float(values[0].detach()) == pytest.approx(float(values[1].detach()), rel=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_a_student_that_is_sure_of_another_class_has_a_large_loss_and_a_gradient() -> None:
    certain = torch.tensor([[0.0, 500.0, 0.0, 0.0]], requires_grad=True)
    stored = signals.stored_logits("top", torch.tensor([[3.0, 0.0, 2.0, 0.0]]), 2, 1.0, torch.Generator())
    known = signals.outputs_of("top", stored, 4, 1.0).known_classes
    assert known is not None
    divergence = known_kl(certain, known)
    divergence.backward()
    assert 50 < float(divergence.detach()) < 1000
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()
    assert float(certain.grad[0, 0]) < -0.5
    assert float(certain.grad[0, 1]) > 0.5
