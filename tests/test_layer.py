"""Layers as matrices, and the names that patterns see."""

from __future__ import annotations

import pytest
import torch

from aicompress.layer import LayerInfo, as_matrix, from_matrix


@pytest.mark.parametrize(
    ("shape", "transposed", "matrix"),
    [((6, 4), False, (6, 4)), ((4, 6), True, (6, 4)), ((8, 3, 2, 2), False, (8, 12)), ((8, 3, 5), False, (8, 15))],
)
def test_matrix_and_back(shape: tuple[int, ...], transposed: bool, matrix: tuple[int, int]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = as_matrix(tensor, transposed)
    assert found.shape == matrix
    assert torch.equal(from_matrix(found, shape, transposed), tensor)


def test_a_transposed_parameter_is_transposed() -> None:
    assert as_matrix(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), True).tolist() == [[1.0, 3.0], [2.0, 4.0]]


def info(name: str, part: str = "") -> LayerInfo:
    return LayerInfo(name, f"{name}.weight", "linear", (2, 2), (2, 2), torch.float32, part=part)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "index"),
    [("model.layers.3.mlp.up_proj", 3), ("h.11.attn.c_attn", 11), ("fc1", None), ("experts.2.layers.5.w1", 2)],
)
def test_depth_is_the_first_number(name: str, index: int | None) -> None:
    assert info(name).index == index


def test_a_factor_answers_to_its_layer() -> None:
    assert info("fc1.low_rank.out", "out").names == ("fc1.low_rank.out", "fc1")
    assert info("fc1").names == ("fc1",)
