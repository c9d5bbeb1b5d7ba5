"""Stored forms of logits: what comes back is the distribution that was stored, or has it for its expectation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from aicompress.methods.distill import signals
from aicompress.methods.distill.kl import known_kl, softened_kl
from aicompress.methods.distill.signals import Form
from aicompress.methods.outputs import wanted

DRAWS = torch.Generator().manual_seed(0)


def returned(
    form: Form, logits: torch.Tensor, k: int, temperature: float = 2.0, student: torch.Tensor | None = None
) -> torch.Tensor:
    """Probabilities that come back, beside a student that finds all classes equally likely or another one."""
    stored = signals.stored_logits(form, logits, k, temperature, DRAWS)
    assert sum(each.nbytes for each in stored.values()) == len(logits) * signals.position_bytes(
        form, logits.shape[1], k
    )
    back = signals.outputs_of(form, stored, logits.shape[1], temperature)
    if back.known_classes is None:
        return (wanted(back.logits, "logits") / temperature).softmax(dim=-1)
    beside = torch.zeros_like(logits) if student is None else student
    return (signals.completed(back.known_classes, beside) / temperature).softmax(dim=-1)


@pytest.mark.parametrize(("form", "classes"), [("every", 5), ("top", 5), ("top", 70_000), ("drawn", 70_000)])
def test_a_case_worked_by_hand(form: Form, classes: int) -> None:
    p = torch.full((2, classes), 0.2 / (classes - 2))
    p[:, 1], p[:, 4] = 0.5, 0.3
    back = returned(form, 3 * p.log(), 2, temperature=3.0)  # what is left over is even, as in the student
    if form == "drawn":
        assert set((back * 2).round(decimals=4).unique().tolist()) <= {0.0, 1.0, 2.0}
    else:
        torch.testing.assert_close(back, p, rtol=2e-3, atol=1e-6)


def test_draws_are_right_on_average_and_the_known_classes_ones_are_not() -> None:
    logits = 2 * torch.randn(1, 40, generator=DRAWS)
    p = (logits / 2).softmax(dim=-1)
    drawn = returned("drawn", logits.expand(8000, -1), 4).mean(dim=0)
    top = returned("top", logits, 4)[0]
    assert float((drawn - p[0]).abs().max()) < 0.01 < float((top - p[0]).abs().max())


def test_repeats_are_counted() -> None:
    classes = torch.tensor([[5, 2, 5, 9, 5], [1, 1, 0, 0, 7]])
    assert signals.repeats(classes).tolist() == [[3, 1, 3, 1, 3], [2, 2, 2, 2, 1]]


def test_the_gradient_of_kl_is_right_on_average() -> None:
    logits, student = torch.randn(1, 12, generator=DRAWS), torch.randn(1, 12, generator=DRAWS)

    many = logits.expand(20_000, -1)
    stored = signals.stored_logits("drawn", many, 3, 1.0, DRAWS)
    known = signals.outputs_of("drawn", stored, 12, 1.0).known_classes
    assert known is not None

    def gradient(divergence: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ours = student.expand(len(many), -1).clone().requires_grad_(True)
        divergence(ours).backward()
        return ours.grad.sum(dim=0)

    back = gradient(lambda ours: known_kl(ours, known))
    torch.testing.assert_close(back, gradient(lambda ours: softened_kl(ours, many, 1.0)), atol=0.01, rtol=0)


def test_what_the_known_classes_classes_leave_over_pulls_at_nothing_among_the_others() -> None:
    logits, student = 2 * torch.randn(5, 40, generator=DRAWS), torch.randn(5, 40, generator=DRAWS)
    p, kept = (logits / 2).softmax(dim=-1), logits.topk(6, dim=-1).indices

    def together(each: torch.Tensor) -> torch.Tensor:
        """Probabilities (5, 7) of six classes, and of all others."""
        known = each.gather(1, kept)
        return torch.cat([known, 1 - known.sum(dim=-1, keepdim=True)], dim=-1)

    ours, same = (student.clone().requires_grad_(True) for _ in range(2))
    teacher = 2 * returned("top", logits, 6, student=student).log()
    divergence = softened_kl(ours, teacher, 2.0)
    q = together((same / 2).softmax(dim=-1))
    grouped = 4 * (together(p) * (together(p) / q).log()).sum(dim=-1).mean()
    assert float(divergence.detach()) == pytest.approx(float(grouped.detach()), rel=2e-3)
    assert float(divergence.detach()) < float(
        softened_kl(student, logits, 2.0)
    )  # grouping loses information, and adds none
    for each in (divergence, grouped):
        each.backward()
    torch.testing.assert_close(ours.grad, same.grad, atol=1e-3, rtol=0)


@pytest.mark.parametrize("classes", [30, 50])
def test_a_student_of_other_classes_is_completed_over_the_teachers(classes: int) -> None:
    logits = torch.randn(3, 40, generator=DRAWS)
    back = returned("top", logits, 6, student=torch.randn(3, classes, generator=DRAWS))
    assert back.shape == (3, 40)
    kept = logits.topk(6, dim=-1).indices
    torch.testing.assert_close(back.gather(1, kept), (logits / 2).softmax(dim=-1).gather(1, kept), rtol=3e-3, atol=0)
    torch.testing.assert_close(back.sum(dim=-1), torch.ones(3))
