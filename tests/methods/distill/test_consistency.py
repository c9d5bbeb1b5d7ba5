from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy as mean_cross_entropy

from aicompress.methods.distill.consistency import Config, probability_error
from aicompress.methods.distill.logits import cross_entropy


def test_squared_distance_of_probabilities_by_hand() -> None:
    student = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # 3/4 and 1/4; 1/2 and 1/2
    teacher = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])  # 1/4 and 3/4; 1/2 and 1/2
    assert float(probability_error(student, teacher)) == pytest.approx((0.5**2 + 0.5**2) / 2)


def test_it_is_bounded_where_the_divergence_is_not() -> None:
    certain = torch.tensor([[50.0, -50.0]])
    assert float(probability_error(certain, -certain)) == pytest.approx(2.0)


def test_the_weight_rises_along_the_papers_curve() -> None:
    config = Config(weight=4.0, ramp=0.5)
    assert config.weight_at(0.0) == pytest.approx(4 * math.exp(-5))
    assert config.weight_at(0.25) == pytest.approx(4 * math.exp(-5 / 4))
    assert config.weight_at(0.5) == config.weight_at(1.0) == 4.0
    assert Config(ramp=0).weight_at(0.0) == 1.0


def test_samples_without_a_label_add_nothing_to_the_cross_entropy() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, -1, 2, -1])
    known = mean_cross_entropy(logits[[0, 2]], labels[[0, 2]], reduction="sum")
    assert float(cross_entropy(logits, labels)) == pytest.approx(float(known) / 4)
    assert float(cross_entropy(logits, torch.full((4,), -1))) == 0.0
