"""Ranks of layers that share a factor: one for a group, by what its layers gain together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from aicompress.methods.decisions import SurveySetting
from aicompress.methods.factorize.base_delta import BaseDeltaConfig
from aicompress.methods.factorize.stack import METHOD, StackConfig
from aicompress.weights import outline_nbytes
from tests.methods.factorize.test_stack import SHARES, stored, three
from tests.methods.layers import candidate_of

assert METHOD.allocates is not None
assert METHOD.surveys is not None


def candidates(config: StackConfig) -> list:
    """Three layers of one input in one block, of few directions, and three in the next one, of all."""
    layers = [replace(layer, gradients=None) for layer in three(directions=6)]
    later = [replace(layer, info=replace(layer.info, name=layer.info.name.replace("0", "1"))) for layer in three()]
    given = [(layer, block) for block, members in enumerate((layers, later)) for layer in members]
    return [replace(candidate_of(layer, config), input_name=lambda at=at: f"layers.{at}") for layer, at in given]


@pytest.mark.parametrize("whiten", [True, False])
def test_energy_is_that_of_the_layers_together(whiten: bool) -> None:
    config = StackConfig(energy=0.9, whiten=whiten, damping=0, relative=False)
    given = candidates(config)
    decide = METHOD.surveys.decide if whiten else METHOD.allocates.resolve
    decided = decide(given, SurveySetting(0, lambda layer, weight: 0.0) if whiten else 0)  # type: ignore[operator]
    ranks = [each.rank for each in decided]
    assert len(set(ranks[:3])) == len(set(ranks[3:])) == 1
    assert ranks[0] < ranks[3]
    layers = [candidate.read() for candidate in given[3:]]
    for rank, enough in ((ranks[3], True), (ranks[3] - 1, False)):
        weights = SHARES.compress(layers, config.model_copy(update={"energy": None, "rank": rank, "shift": 0.0}))
        lost = total = 0.0
        for layer, weight in zip(layers, weights, strict=True):
            gram = layer.inputs.gram.double() if whiten else torch.eye(40, dtype=torch.float64)
            off, own = (layer.weight - weight.dense()).double(), layer.weight.double()
            lost, total = lost + float((off @ gram * off).sum()), total + float((own @ gram * own).sum())
        assert (lost <= 0.1001 * total) == enough


def test_bytes_go_to_the_group_that_gains_most_and_are_kept() -> None:
    config = StackConfig(target_bytes=9000, whiten=False)
    given = candidates(config)
    decided = METHOD.allocates.resolve(given, 1000)
    assert decided[0].rank is not None
    assert decided[0].rank < decided[3].rank  # six directions are all of the first group
    size = 0
    for part in (slice(0, 3), slice(3, 6)):
        weights = SHARES.outline([candidate.info for candidate in given[part]], decided[part.start])
        size += stored(weights)
    assert 8000 - 4 * (40 + 48) <= size <= 8000


def test_until_it_is_calibrated_the_plan_has_ranks_by_the_weights() -> None:
    given = candidates(StackConfig(target_bytes=9000))
    estimates = METHOD.allocates.resolve(given, 1000)
    assert all(each.rank and each.whiten and each.target_bytes == 9000 for each in estimates)
    assert METHOD.surveys.statistics(estimates[0]) == {"gram"}
    tried = METHOD.allocates.resolve(candidates(StackConfig(max_kl=0.1)), 0)
    assert {each.shift for each in tried} == {0.0}
    assert all(outline_nbytes(METHOD.outline(c.info, each)) > 0 for c, each in zip(given, tried, strict=True))


def test_differences_have_no_ranks_before_their_base_is_known() -> None:
    for field in ("energy", "target_bytes", "max_kl"):
        with pytest.raises(ValidationError, match=field):
            BaseDeltaConfig(**{field: 0.5})
