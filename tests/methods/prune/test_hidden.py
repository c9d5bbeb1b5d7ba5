from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from aicompress.errors import CompressError, RecipeError
from aicompress.methods.prune.hidden import HiddenConfig, keep, norms, refit, sizes
from aicompress.methods.structural import Part, Structure
from aicompress.statistics import InputStats


def stream(inputs: dict[str, InputStats] | None = None) -> Structure:
    """Four coordinates: an embedding of three tokens adds, a layer of two outputs reads, a norm has one number each."""
    embedding = torch.tensor([[1.0, 0, 0], [0, 2, 0], [2, 2, 1], [0, 0, 0]])
    reader = torch.tensor([[3.0, 0], [0, 1], [1, 1], [2, 0]])
    parts = (
        Part("embed.weight", "embed[0]", "producer", 0, lambda: embedding),
        Part("read.weight", "read[0]", "consumer", 0, lambda: reader),
        Part("read.bias", "read[0]", "offset", 0, lambda: torch.zeros(1, 2)),
        Part("norm.weight", "norm[0]", "producer", 0, lambda: torch.tensor([[9.0], [0], [0], [0]]), single=True),
    )
    return Structure("hidden", 4, parts, inputs=inputs or {})


def test_norms_by_hand() -> None:
    # Squares of the embedding's rows, 1, 4, 9, 0, have the mean 3.5; 9, 1, 2, 4 of the reader 4; a norm is no matrix.
    wanted = torch.tensor([1 / 3.5 + 9 / 4, 4 / 3.5 + 1 / 4, 9 / 3.5 + 2 / 4, 0 + 4 / 4]).double()
    torch.testing.assert_close(norms(stream()), wanted)
    assert keep(stream(), 2, HiddenConfig(keep=0.5)) == [0, 2]


def test_activation_takes_what_readers_are_given() -> None:
    config = HiddenConfig(keep=0.5, score="activation")
    seen = {
        "read.weight": InputStats(10, columns={"mean_abs": torch.tensor([0.0, 3, 1, 2])}),
        "other.weight": InputStats(0),
        "third.weight": InputStats(10, columns={"mean_abs": torch.tensor([0.0, 0, 4, 0])}),
    }
    assert keep(stream(seen), 2, config) == [1, 2]
    with pytest.raises(CompressError, match="no calibration token"):
        keep(stream({"other.weight": InputStats(0)}), 2, config)


def test_the_first_of_equals_stays() -> None:
    same = {"read.weight": InputStats(10, columns={"mean_abs": torch.ones(4)})}
    assert keep(stream(same), 2, HiddenConfig(keep=0.5, score="activation")) == [0, 1]


def test_a_coordinate_that_others_tell_costs_nothing_after_the_fit() -> None:
    rows = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) + 1
    inputs = torch.cat([rows, rows[:, :1] - 2 * rows[:, 1:2] + 0.5], dim=1)  # the last is told by the first two
    stats = InputStats(200, inputs.t() @ inputs / 200, columns={"mean": inputs.mean(0)})
    config = HiddenConfig(keep=0.75, refit=True, damping=1e-9)
    made = refit(stream({"read.weight": stats}), [0, 1, 2], config)
    whole = stream().parts[1].read()
    given = inputs[:, :3] @ made["read.weight"] + made["read.bias"]
    torch.testing.assert_close(given, inputs @ whole, rtol=1e-3, atol=1e-3)
    assert refit(stream({"read.weight": stats}), [0, 1, 2], HiddenConfig(keep=0.75)) == {}


@pytest.mark.parametrize(
    ("fields", "width", "expected"),
    [
        ({"sparsity": 0.0}, 100, 100),
        ({"sparsity": 0.125}, 256, 224),
        ({"keep": 0.51, "multiple": 1}, 100, 51),
        ({"sparsity": 0.999}, 64, 8),
        ({"hidden_size": 60}, 64, 60),
    ],
)
def test_sizes(fields: dict[str, Any], width: int, expected: int) -> None:
    assert sizes([Structure("hidden", width, ())], HiddenConfig(**fields)) == [expected]


def test_refuses_to_widen() -> None:
    with pytest.raises(RecipeError, match="has 4 coordinates"):
        sizes([stream()], HiddenConfig(hidden_size=5))


@pytest.mark.parametrize(
    "fields", [{}, {"sparsity": 1.0}, {"keep": 0.5, "hidden_size": 4}, {"keep": 0.5, "score": "x"}]
)
def test_refuses_bad_parameters(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HiddenConfig(**fields)
