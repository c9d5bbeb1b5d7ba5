"""Losses between the token relations of mapped layers."""

from __future__ import annotations

import pytest
import torch

from aicompress.methods.distill.relation import METHOD, Config, relation_error
from aicompress.methods.outputs import Outputs, OutputShapes

TOKENS = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [9.0, 9.0]]])  # the third one is padding
ORTHOGONAL = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 2.0], [1.0, 0.0, 0.0]]])


def test_by_hand() -> None:
    # of the four pairs of real tokens, two differ: cosine 3/5 against 0
    mask = torch.tensor([[True, True, False]])
    assert float(relation_error(TOKENS, ORTHOGONAL, mask)) == pytest.approx(2 * 0.36 / 4)


def test_rotation_and_scale_do_not_count() -> None:
    turn = torch.tensor([[0.0, -3.0], [3.0, 0.0]])
    assert float(relation_error(TOKENS @ turn, TOKENS, None)) == pytest.approx(0.0, abs=1e-12)


def test_the_loss_is_the_mean_over_layers() -> None:
    student = Outputs(hidden=(TOKENS, TOKENS, TOKENS))
    teacher = Outputs(hidden=(ORTHOGONAL, TOKENS, ORTHOGONAL))
    half = float(relation_error(TOKENS, ORTHOGONAL, None)) / 2
    assert float(METHOD.loss(student, teacher, Config())) == pytest.approx(half)


def test_widths_may_differ() -> None:
    assert METHOD.check(OutputShapes(width=32, depth=2), OutputShapes(width=48, depth=3), Config()) is None
    assert METHOD.check(OutputShapes(classes=10), OutputShapes(width=48, depth=3), Config()) is not None
