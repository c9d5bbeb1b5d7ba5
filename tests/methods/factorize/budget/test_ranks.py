"""Ranks of fewest bytes within a measured loss, beside the best budget of all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from aicompress.methods.factorize.budget.ranks import TRIES, Spectrum, allocate, within_divergence
from aicompress.methods.factorize.svd import SvdConfig, resolve
from tests.methods.layers import candidate_of, layer_of, randn

SHAPES = [(48, 64), (64, 64), (64, 160)]


def spectra() -> list[Spectrum]:
    draw = torch.Generator().manual_seed(0)
    gains = [torch.rand(min(shape), generator=draw).double().pow(4).sort(descending=True).values for shape in SHAPES]
    return [Spectrum(g, 2 * sum(shape), 2 * shape[0] * shape[1]) for g, shape in zip(gains, SHAPES, strict=True)]


@pytest.mark.parametrize("power", [1.0, 1.6])
@pytest.mark.parametrize("limit", [0.02, 0.3, 2.0])
def test_close_to_the_fewest_bytes_in_a_few_trials(power: float, limit: float) -> None:
    layers, tried = spectra(), []

    def lost(ranks: Sequence[int]) -> float:
        """In another unit than the spectra, and not in proportion to what they leave out."""
        left = sum(float(layer.gains[rank:].sum()) for layer, rank in zip(layers, ranks, strict=True))
        return 0.3 * left**power

    def measured(ranks: Sequence[int]) -> float:
        tried.append(ranks)
        return lost(ranks)

    def nbytes(ranks: Sequence[int]) -> int:
        return sum(min(rank * s.rank_bytes, s.dense_bytes) for rank, s in zip(ranks, layers, strict=True))

    ranks = within_divergence(layers, limit, measured)
    assert lost(ranks) <= limit
    assert len(tried) <= TRIES
    dense = sum(layer.dense_bytes for layer in layers)
    fitting = [found for share in range(20, 101) if lost(found := allocate(layers, dense * share // 100)) <= limit]
    assert nbytes(ranks) <= 1.06 * min(nbytes(each) for each in fitting)


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 8), (torch.bfloat16, 16)])
def test_ranks_of_large_layers_are_multiples_that_kernels_like(dtype: torch.dtype, multiple: int) -> None:
    layers = [layer_of(randn(256, columns, seed=columns).to(dtype)) for columns in (256, 272)]
    budget = sum(layer.info.nbytes for layer in layers) // 2
    configs = resolve([candidate_of(layer, SvdConfig(target_bytes=budget)) for layer in layers], 0)
    assert all(config.rank and config.rank % multiple == 0 for config in configs)
    small = layer_of(randn(64, 64))
    (config,) = resolve([candidate_of(small, SvdConfig(target_bytes=64 * 64 * 2 + 600))], 0)
    assert config.rank == 17


def test_what_no_rank_keeps_stays_dense() -> None:
    layers = spectra()
    assert within_divergence(layers, 1e-9, lambda ranks: 1.0) == [min(shape) for shape in SHAPES]
