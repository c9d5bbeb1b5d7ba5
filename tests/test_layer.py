"""Layers as matrices, and the names that patterns see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aicompress.layer import InputStats, LayerInfo, as_matrix, from_matrix


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


def test_statistics_of_nothing_add_nothing() -> None:
    """An expert that one of two files never saw."""
    seen = InputStats(3, torch.eye(2), torch.ones(2), torch.ones(2))
    assert InputStats(0).merged(seen) is seen
    assert seen.merged(InputStats(0)) is seen
    assert InputStats(0).merged(InputStats(0)).count == 0


def test_statistics_of_rescaled_inputs_are_those_of_the_rescaled_rows() -> None:
    rows, factors = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 1.0, 4.0])

    def stats(rows: Tensor) -> InputStats:
        gram, size = rows.t() @ rows / len(rows), rows.abs()
        return InputStats(len(rows), gram, gram.diagonal(), size.mean(0), gram * 1.5, size.amax(0))

    found, expected = stats(rows).divided(factors), stats(rows / factors)
    for name in ("gram", "norms", "mean_abs", "cross", "max_abs"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert InputStats(3).divided(factors) == InputStats(3)


def test_the_largest_input_of_two_samples_is_the_larger() -> None:
    one, two = InputStats(3, max_abs=torch.tensor([1.0, 5.0])), InputStats(9, max_abs=torch.tensor([2.0, 1.0]))
    found = one.merged(two).max_abs
    assert found is not None
    assert found.tolist() == [2.0, 5.0]
