"""What is taken for a width that no layer could be measured at, and what a refinement may try."""

from __future__ import annotations

import pytest
import torch

from aicompress.methods.quantize.grid.widths import Width
from aicompress.pipeline.layerwise.allocation.refine import Tables, _child
from aicompress.pipeline.layerwise.allocation.sensitivity import _like

KNOWN = {Width(2, 16): 9.0, Width(2, 128): 12.0, Width(2, 256): 13.0, Width(3, 32): 4.0, Width(8): 0.5}


@pytest.mark.parametrize(
    ("width", "loss"),
    [
        (Width(2, 128), 12.0),
        (Width(2, 32), 12.0),  # the next larger groups, not the nearer but smaller ones
        (Width(2, 512), 13.0),
        (Width(3, 64), 4.0),
        (Width(8, 32), 0.5),
        (Width(4, 64), 7.0),  # nothing of as many bits: what was measured
    ],
)
def test_the_most_similar_width_stands_in(width: Width, loss: float) -> None:
    assert _like(width, KNOWN, 7.0) == loss


@pytest.mark.parametrize("widths", [2, 4, 16])
def test_children_keep_the_budget_and_rise_further_where_there_are_more_widths(widths: int) -> None:
    costs = [[100.0 + 10 * n + unit for n in range(widths)] for unit in range(12)]
    parent = tuple(unit % 2 for unit in range(12))
    tables = Tables(costs, costs, sum(row[pick] for row, pick in zip(costs, parent, strict=True)))
    generator = torch.Generator().manual_seed(0)
    children = [child for _ in range(200) if (child := _child(tables, parent, generator)) is not None]
    assert children
    assert all(tables.cost(child) <= tables.budget for child in children)
    assert all(0 <= pick < widths for child in children for pick in child)
    assert max(max(child) for child in children) == min(widths - 1, 1 + max(1, widths // 4))
