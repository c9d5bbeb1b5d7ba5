from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from aicompress.errors import RecipeError
from aicompress.methods.prune.depth import DepthConfig, evenly_spaced, keep, sizes
from aicompress.methods.structural import Part, Structure


def stack(*weights: float) -> Structure:
    """Blocks of one 2 x 2 matrix each, whose elements are ±w."""
    parts = tuple(
        Part(f"{block}.weight", str(block), "whole", block, lambda w=w: torch.tensor([[w, -w, w, -w]]))  # type: ignore[misc]
        for block, w in enumerate(weights)
    )
    return Structure("layers", len(weights), parts)


SIX = stack(3.0, 1.0, 2.0, 1.0, 5.0, 4.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"drop": (1, 4)}, [0, 2, 3, 5]),
        ({"drop": ()}, [0, 1, 2, 3, 4, 5]),
        ({"keep": (1, 4)}, [1, 4]),
        ({"keep_layers": 2, "strategy": "top"}, [0, 1]),
        ({"keep_layers": 2, "strategy": "bottom"}, [4, 5]),
        ({"keep_layers": 3, "strategy": "middle"}, [0, 1, 5]),
        ({"drop_layers": 2, "strategy": "middle"}, [0, 1, 4, 5]),
        ({"keep_layers": 3}, [0, 3, 5]),
        ({"keep_layers": 1}, [0]),
        ({"keep_layers": 0.5}, [0, 3, 5]),
        ({"keep_layers": 0.01}, [0]),
        ({"drop_layers": 0}, [0, 1, 2, 3, 4, 5]),
        ({"drop_layers": 3, "strategy": "magnitude"}, [0, 4, 5]),
        ({"drop_layers": 1, "strategy": "magnitude"}, [0, 1, 2, 4, 5]),  # of the equal blocks 1 and 3 the lower stays
    ],
)
def test_which_blocks_stay(fields: dict[str, Any], expected: list[int]) -> None:
    config = DepthConfig(**fields)
    (size,) = sizes([SIX], config)
    assert keep(SIX, size, config) == expected


@given(st.integers(1, 200), st.data())
def test_evenly_spaced_is_even(count: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, count))
    found = evenly_spaced(count, size)
    gaps = [b - a for a, b in pairwise(found)]
    assert len(found) == size
    assert found[0] == 0
    assert size == 1 or found[-1] == count - 1
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert all(gap >= 1 for gap in gaps)


@pytest.mark.parametrize("fields", [{"drop": (6,)}, {"drop": (-1,)}, {"drop_layers": 6}, {"keep_layers": 7}])
def test_refuses_what_the_stack_does_not_have(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="layers has"):
        sizes([SIX], DepthConfig(**fields))


@pytest.mark.parametrize(
    "fields",
    [{}, {"keep_layers": 0}, {"keep_layers": 1.0}, {"drop": (1,), "keep_layers": 2}, {"drop": (1,), "strategy": "top"}],
)
def test_refuses_bad_parameters(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DepthConfig(**fields)
