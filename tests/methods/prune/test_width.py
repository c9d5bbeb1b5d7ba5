from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.methods.prune.units.units import curve, keep, scores
from aicompress.methods.prune.width import WidthConfig, sizes
from aicompress.methods.structural import Part, Structure
from aicompress.statistics import InputStats


def layer(up: Tensor, bias: Tensor, down: Tensor) -> Structure:
    """Rows of producers and columns of the consumer, one row per neuron."""
    parts = (
        Part("up.weight", "up", "producer", 0, lambda: up),
        Part("up.bias", "up", "producer", 0, lambda: bias[:, None]),
        Part("down.weight", "down", "consumer", 0, lambda: down),
    )
    return Structure("mlp", len(up), parts)


def structure(size: int) -> Structure:
    return Structure("mlp", size, ())


def test_scores_by_hand() -> None:
    up, bias = torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 2.0]]), torch.tensor([4.0, 0.0, 1.0])
    down = torch.tensor([[1.0], [12.0], [2.0]])
    # |[3, 0, 4]| = 5, |[0, 1, 0]| = 1, |[2, 2, 1]| = 3
    assert scores(layer(up, bias, down), "product").tolist() == pytest.approx([5, 12, 6])
    assert scores(layer(up, bias, down), "sum").tolist() == pytest.approx([26, 145, 13])
    assert keep(layer(up, bias, down), 2, WidthConfig(sparsity=0.3)) == [1, 2]
    assert keep(layer(up, bias, down), 2, WidthConfig(sparsity=0.3, score="sum")) == [0, 1]


def test_curves_by_hand() -> None:
    up, bias, down = torch.tensor([[3.0], [1.0], [2.0]]), torch.zeros(3), torch.tensor([[1.0], [1.0], [1.0]])
    found = layer(up, bias, down)  # products 3, 1, 2 of mean 2
    assert curve(found, [3, 2, 1, 0], "product") == pytest.approx([0, 0.5, 1.5, 3])
    graded = replace(found, importance=torch.tensor([0.1, 0.4, 0.2], dtype=torch.float64))
    assert curve(graded, [2, 3, 1], "taylor") == pytest.approx([0.1, 0, 0.3])
    # The neurons of mean |x| 1, 2, 5 go in this order, and give (1 · 2)², (2 · 1)² and (5 · 1)² to the output.
    wide = layer(up, bias, torch.tensor([[2.0], [1.0], [1.0]]))
    seen = replace(wide, inputs={"down.weight": InputStats(9, columns={"mean_abs": torch.tensor([1.0, 2.0, 5.0])})})
    assert curve(seen, [3, 2, 1, 0], "activation") == pytest.approx([0, 4, 8, 33])


def test_product_ignores_a_scale_that_the_consumer_undoes() -> None:
    generator = torch.Generator().manual_seed(0)
    up, bias = torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator)
    down, scale = torch.randn(8, 5, generator=generator), torch.logspace(-3, 3, 8)
    scaled = layer(up * scale[:, None], bias * scale, down / scale[:, None])
    torch.testing.assert_close(scores(scaled, "product"), scores(layer(up, bias, down), "product"))


def test_the_first_of_equals_stays() -> None:
    same = layer(torch.ones(6, 2), torch.zeros(6), torch.ones(6, 2))
    assert keep(same, 4, WidthConfig(keep=0.5)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "width", "expected"),
    [
        ({"sparsity": 0.0}, 100, 100),
        ({"sparsity": 0.2, "multiple": 1}, 100, 80),
        ({"sparsity": 0.2}, 704, 568),
        ({"sparsity": 0.5, "multiple": 32}, 1536, 768),
        ({"sparsity": 0.99, "multiple": 1}, 10, 1),
        ({"keep": 0.3, "multiple": 1}, 10, 3),
        ({"keep": 1.0}, 13, 13),
        ({"intermediate_size": 7}, 10, 7),
    ],
)
def test_sizes(fields: dict[str, float], width: int, expected: int) -> None:
    assert sizes([structure(width)], WidthConfig(**fields)) == [expected]


@given(st.integers(1, 300), st.floats(0, 0.999), st.integers(1, 64))
def test_sizes_are_never_empty_wider_or_below_what_was_asked(width: int, sparsity: float, multiple: int) -> None:
    (size,) = sizes([structure(width)], WidthConfig(sparsity=sparsity, multiple=multiple))
    assert 1 <= size <= width
    assert size >= width * (1 - sparsity) - 1e-4
    assert size % multiple == 0 or size == width


def test_refuses_to_widen() -> None:
    with pytest.raises(RecipeError, match="has 10 neurons"):
        sizes([structure(10)], WidthConfig(intermediate_size=11))


@pytest.mark.parametrize("fields", [{}, {"sparsity": 0.5, "keep": 0.5}, {"sparsity": 1.0}, {"keep": 0.0}])
def test_refuses_bad_parameters(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        WidthConfig(**fields)
