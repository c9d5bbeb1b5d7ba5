"""Mean squared error of logits."""

from __future__ import annotations

import math

import pytest
import torch

from aicompress.methods.distill.kl import softened_kl
from aicompress.methods.distill.mse import METHOD, Config, squared_error
from aicompress.methods.outputs import Outputs


def test_by_hand() -> None:
    error = squared_error(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    assert float(error) == pytest.approx((4 + 9) / 4)


def test_it_is_the_limit_of_softened_kl_for_zero_mean_logits() -> None:
    # Hinton 2015, section 2.1: T² KL -> mean over classes of (s - t)² / 2 as T grows
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    student, teacher = (z - z.mean(-1, keepdim=True) for z in (student, teacher))
    hot = softened_kl(student.double(), teacher.double(), 300.0)
    assert float(hot) == pytest.approx(float(squared_error(student, teacher)) / 2, rel=2e-2)


def test_labels_take_the_share_that_alpha_leaves() -> None:
    student = Outputs(logits=torch.zeros(1, 4), labels=torch.tensor([2]))
    loss = METHOD.loss(student, Outputs(logits=torch.full((1, 4), 2.0)), Config(alpha=0.5))
    assert float(loss) == pytest.approx(0.5 * 4.0 + 0.5 * math.log(4.0))
