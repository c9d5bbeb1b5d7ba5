"""Losses between hidden states of mapped layers."""

from __future__ import annotations

import pytest
import torch

from aicompress.methods.distill.hidden import METHOD, Config, hidden_error
from aicompress.methods.outputs import Outputs, OutputShapes

STATES = torch.tensor([[[1.0, 1.0], [2.0, 0.0]]])  # (1 sample, 2 tokens, width 2)


def test_errors_by_hand() -> None:
    other = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])
    assert float(hidden_error(STATES, other, None, "mse")) == pytest.approx((4 + 4) / 4)
    assert float(hidden_error(STATES, other, None, "squarehead")) == pytest.approx((8 / 4) / (10 / 4))


def test_padding_does_not_count() -> None:
    other = torch.tensor([[[1.0, 3.0], [100.0, 100.0]]])
    mask = torch.tensor([[True, False]])
    assert float(hidden_error(STATES, other, mask, "mse")) == pytest.approx(4 / 2)


def test_squarehead_does_not_depend_on_the_scale_of_the_layer() -> None:
    other = STATES + 0.5
    small, large = (float(hidden_error(STATES * f, other * f, None, "squarehead")) for f in (1.0, 50.0))
    assert small == pytest.approx(large)


def test_a_shallow_student_learns_from_mapped_layers() -> None:
    teacher = tuple(torch.full((1, 2, 2), float(layer)) for layer in range(5))  # four layers
    student = Outputs(hidden=(teacher[0] + 9, teacher[2], teacher[4]))  # two layers, as the teacher's 2 and 4
    loss = METHOD.loss(student, Outputs(hidden=teacher), Config(distance="mse"))
    assert float(loss) == 0.0
    chosen = METHOD.loss(student, Outputs(hidden=teacher), Config(distance="mse", layers=(0,)))
    assert float(chosen) == pytest.approx(81.0)


def test_what_does_not_fit_is_refused() -> None:
    student = OutputShapes(width=32, depth=2)
    assert METHOD.check(student, OutputShapes(width=48, depth=4), Config()) is not None
    assert METHOD.check(student, OutputShapes(width=32, depth=4), Config(layers=(3,))) is not None
    assert METHOD.check(OutputShapes(classes=10), OutputShapes(width=32, depth=4), Config()) is not None
    assert METHOD.check(student, OutputShapes(width=32, depth=4), Config(layers=(0, 2))) is None
