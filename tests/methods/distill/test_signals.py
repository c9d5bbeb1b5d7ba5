"""Stored forms of logits: what comes back is the distribution that was stored, or has it for its expectation."""

from __future__ import annotations

import pytest
import torch

from aicompress.methods.distill import signals
from aicompress.methods.distill.kl import softened_kl
from aicompress.methods.distill.signals import Form

DRAWS = torch.Generator().manual_seed(0)


def returned(form: Form, logits: torch.Tensor, k: int, temperature: float = 2.0) -> torch.Tensor:
    stored = signals.stored_logits(form, logits, k, temperature, DRAWS)
    assert sum(each.nbytes for each in stored.values()) == len(logits) * signals.position_bytes(
        form, logits.shape[1], k
    )
    back = signals.logits_of(form, stored, logits.shape[1], temperature)
    return (back / temperature).softmax(dim=-1)


@pytest.mark.parametrize(("form", "classes"), [("every", 5), ("top", 5), ("top", 70_000), ("drawn", 70_000)])
def test_a_case_worked_by_hand(form: Form, classes: int) -> None:
    p = torch.full((2, classes), 0.2 / (classes - 2))
    p[:, 1], p[:, 4] = 0.5, 0.3
    back = returned(form, 3 * p.log(), 2, temperature=3.0)  # what is left over is even, as `top` takes it to be
    if form == "drawn":
        assert set((back * 2).round(decimals=4).unique().tolist()) <= {0.0, 1.0, 2.0}
    else:
        torch.testing.assert_close(back, p, rtol=2e-3, atol=1e-6)


def test_draws_are_right_on_average_and_the_most_likely_ones_are_not() -> None:
    logits = 2 * torch.randn(1, 40, generator=DRAWS)
    p = (logits / 2).softmax(dim=-1)
    drawn = returned("drawn", logits.expand(8000, -1), 4).mean(dim=0)
    top = returned("top", logits, 4)[0]
    assert float((drawn - p[0]).abs().max()) < 0.01 < float((top - p[0]).abs().max())


def test_the_gradient_of_kl_is_right_on_average() -> None:
    logits, student = torch.randn(1, 12, generator=DRAWS), torch.randn(1, 12, generator=DRAWS)

    def gradient(teacher: torch.Tensor) -> torch.Tensor:
        ours = student.expand(len(teacher), -1).clone().requires_grad_(True)
        softened_kl(ours, teacher, 1.0).backward()
        return ours.grad.sum(dim=0)

    many = logits.expand(20_000, -1)
    stored = signals.stored_logits("drawn", many, 3, 1.0, DRAWS)
    back = gradient(signals.logits_of("drawn", stored, 12, 1.0))
    torch.testing.assert_close(back, gradient(many), atol=0.01, rtol=0)
