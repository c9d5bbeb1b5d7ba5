"""Masks against a plain sort."""

from __future__ import annotations

import pytest
import torch

from aicompress.methods.prune.masks.masks import global_cut, row_mask, top_mask
from tests.methods.layers import randn


def by_sorting(scores: torch.Tensor, kept: int) -> torch.Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.reshape(-1).sort(descending=True, stable=True).indices[:kept]] = True
    return mask.reshape(scores.shape)


@pytest.mark.parametrize("kept", [0, 1, 2, 500, 1000, 1998, 1999, 2000])
@pytest.mark.parametrize("kind", ["float", "bfloat16", "ties", "zeros", "huge", "tiny"])
def test_top_mask_is_a_stable_sort(kind: str, kept: int) -> None:
    scores = randn(40, 50).abs()
    scores = {
        "float": scores,
        "bfloat16": scores.bfloat16().float(),
        "ties": (scores * 2).round(),
        "zeros": torch.zeros(40, 50),
        "huge": scores * 3e37,
        "tiny": scores * 1e-44,
    }[kind]
    mask = top_mask(scores, kept)
    assert int(mask.sum()) == kept
    assert torch.equal(mask, by_sorting(scores, kept))


@pytest.mark.parametrize("kept", [1, 10, 150, 299, 300])
@pytest.mark.parametrize("rounded", [False, True])
def test_global_counts_are_a_stable_sort_of_everything(kept: int, rounded: bool) -> None:
    layers = [(n + 1) * randn(100, seed=n).abs() for n in range(3)]
    layers = [layer.round() for layer in layers] if rounded else layers
    expected = by_sorting(torch.cat(layers), kept).split([100, 100, 100])
    counts = global_cut([lambda layer=layer: layer for layer in layers], kept).counts
    assert counts == [int(mask.sum()) for mask in expected]


def test_row_mask_keeps_the_first_of_equal_scores() -> None:
    assert row_mask(torch.ones(2, 4), 2).tolist() == [[True, True, False, False]] * 2
