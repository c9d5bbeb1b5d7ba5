from __future__ import annotations

import math

import pytest
import torch

from aicompress.methods.distill.attention import Config, check, loss, map_divergence
from aicompress.methods.outputs import Outputs, OutputShapes


def test_divergence_of_maps_by_hand() -> None:
    teacher = torch.tensor([[[[1.0, 0.0], [0.75, 0.25]]]])  # one sample, one head, causal: the first row is exact
    student = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    second = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(map_divergence(student, teacher, None)) == pytest.approx(second / 2)
    assert float(map_divergence(student, teacher, torch.tensor([[True, False]]))) == pytest.approx(0.0)
    assert float(map_divergence(teacher, teacher, None)) == 0.0


def test_unlike_numbers_of_heads_are_compared_by_their_means() -> None:
    teacher = torch.tensor([[[[0.75, 0.25]] * 2, [[0.25, 0.75]] * 2]])  # (1, 2, 2, 2)
    assert float(map_divergence(torch.full((1, 1, 2, 2), 0.5), teacher, None)) == pytest.approx(0.0)


def test_layers_are_mapped_by_depth() -> None:
    maps = tuple(torch.rand(2, 2, 3, 3).softmax(dim=-1) for _ in range(4))
    student = Outputs(attention=(maps[1], maps[3]))  # the second and the fourth of four
    assert float(loss(student, Outputs(attention=maps), Config())) == 0.0
    assert float(loss(student, Outputs(attention=maps[:1]), Config(layers=(1,)))) > 0.0


def test_a_layer_that_is_not_there() -> None:
    shapes = OutputShapes(width=8, depth=2, heads=2)
    assert check(shapes, shapes, Config(layers=(2,))) is None
    problem = check(shapes, shapes, Config(layers=(3,)))
    assert problem is not None
    assert "layer 3 is asked for, the student has 2" in problem[0]
