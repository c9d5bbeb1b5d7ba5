"""whitened: its error identity, also with a singular Gram matrix; what it wins over svd; its target behind others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.curvature import loss
from aicompress.methods.decisions import SurveySetting
from aicompress.methods.factorize import svd
from aicompress.methods.factorize.weighting.roots import Root, Weighting
from aicompress.methods.factorize.whitened import METHOD, WhitenedConfig
from aicompress.statistics import InputStats
from aicompress.weights import LowRank, Weight
from tests.methods.layers import candidate_of, layer_of, randn


def inputs_of(rows: Tensor, original: Tensor | None = None) -> InputStats:
    gram = rows.t() @ rows / len(rows)
    cross = gram if original is None else original.t() @ rows / len(rows)
    return InputStats.of(len(rows), gram, {}, cross)


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Rows with a few strong directions and unlike channels."""
    scales = torch.logspace(0, -2, columns)
    return randn(tokens, columns, seed=seed) * scales @ randn(columns, columns, seed=seed + 1)


def output_error(layer: Layer, weight: Weight, gram: Tensor) -> float:
    return loss((layer.weight - weight.dense()).double(), gram.double())


def test_hand_computed() -> None:
    """diag(1, 2) on inputs of mean squares 16 and 1: W S = diag(4, 2), so that rank 1 keeps the smaller weight."""
    gram = torch.diag(torch.tensor([16.0, 1.0, 1.0, 1.0, 1.0]))
    weight = torch.zeros(5, 5)
    weight[0, 0], weight[1, 1] = 1.0, 2.0
    stats = InputStats.of(100, gram, {}, gram)
    found = METHOD.apply(layer_of(weight, inputs=stats), WhitenedConfig(rank=1, damping=0))
    expected = torch.zeros(5, 5)
    expected[0, 0] = 1.0
    assert torch.allclose(found.dense(), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)], ids=str)
@pytest.mark.parametrize("tokens", [200, 13])
def test_output_error_is_the_sum_of_dropped_squares(shape: tuple[int, int], tokens: int) -> None:
    """Also where fewer tokens than columns leave the Gram matrix singular."""
    stats = inputs_of(correlated(tokens, shape[1]))
    layer = layer_of(randn(*shape, seed=3), inputs=stats)
    squares = Weighting(Root.of(stats.gram, 0.0)).squares(layer.weight)
    for rank in (1, 5, 11):
        found = METHOD.apply(layer, WhitenedConfig(rank=rank, damping=0, shift=0))
        assert output_error(layer, found, stats.gram) == pytest.approx(float(squares[rank:].sum()), rel=1e-3)


def test_no_other_factors_of_the_rank_change_the_output_less() -> None:
    stats = inputs_of(correlated(300, 40))
    layer = layer_of(randn(24, 40, seed=3), inputs=stats)
    ours = output_error(layer, METHOD.apply(layer, WhitenedConfig(rank=6, damping=0)), stats.gram)
    plain = output_error(layer, svd.METHOD.apply(layer, svd.SvdConfig(rank=6)), stats.gram)
    assert ours < 0.7 * plain
    for seed in range(3):
        basis, _ = torch.linalg.qr(randn(24, 6, seed=seed + 1))
        theirs = loss((layer.weight - basis @ (basis.t() @ layer.weight)).double(), stats.gram.double())
        assert ours < theirs


def test_white_inputs_give_the_factors_of_svd() -> None:
    layer = layer_of(randn(24, 40), inputs=InputStats.white(40))
    found = METHOD.apply(layer, WhitenedConfig(rank=6))
    assert torch.allclose(found.dense(), svd.METHOD.apply(layer, svd.SvdConfig(rank=6)).dense(), atol=1e-5)


def test_behind_compressed_layers_the_target_is_the_original_output() -> None:
    """E‖W x − Ŵ x̂‖² is less with the shift than without, and no factors of the rank have less."""
    original = correlated(400, 24)
    compressed = 0.8 * original + 0.3 * correlated(400, 24, seed=5)
    layer = layer_of(randn(16, 24, seed=3), inputs=inputs_of(compressed, original))

    def error(shift: float) -> float:
        found = METHOD.apply(layer, WhitenedConfig(rank=4, damping=0, shift=shift)).dense()
        return float((original @ layer.weight.t() - compressed @ found.t()).square().mean())

    assert error(1.0) < error(0.5) < error(0.0)


def test_factors_have_one_size_so_that_float16_holds_them() -> None:
    """Inputs of 1e-6 and outputs of 1e4 put factors of unlike sizes beside each other, unless they are made even."""
    rows = correlated(200, 24) * 1e-6
    layer = layer_of((1e4 * randn(40, 24)).half(), inputs=inputs_of(rows))
    found = METHOD.apply(layer, WhitenedConfig(rank=6))
    assert isinstance(found, LowRank)
    assert torch.isfinite(found.dense()).all()
    sizes = [factor.float().norm() for factor in (found.out.dense(), found.inner.dense())]
    assert sizes[0] == pytest.approx(float(sizes[1]), rel=0.01)


def test_zero_weights_stay_zero() -> None:
    layer = layer_of(torch.zeros(24, 40), inputs=inputs_of(correlated(200, 40)))
    assert not METHOD.apply(layer, WhitenedConfig(rank=3)).dense().any()


def test_layers_of_one_input_come_out_as_each_by_itself() -> None:
    stats = inputs_of(correlated(200, 40))
    layers = [layer_of(randn(24, 40, seed=seed), f"layers.{seed}.fc", stats) for seed in (1, 2)]
    config = WhitenedConfig(keep=0.5)
    assert METHOD.batched is not None
    for layer, found in zip(layers, METHOD.batched.compress(layers, config), strict=True):
        assert torch.equal(found.dense(), METHOD.apply(layer, config).dense())


def test_energy_counts_what_the_inputs_make_of_it() -> None:
    """A layer whose inputs have few directions takes a smaller rank than by its weights alone."""
    stats = inputs_of(correlated(400, 48) * torch.logspace(0, -3, 48))
    layer = layer_of(randn(48, 48, seed=3), inputs=stats)
    candidate = candidate_of(layer, WhitenedConfig(energy=0.9, damping=0))
    assert METHOD.allocates is not None
    assert METHOD.surveys is not None
    (estimate,) = METHOD.allocates.resolve([candidate], 0)
    assert METHOD.surveys.statistics(estimate) == {"gram", "frequency"}
    (decided,) = METHOD.surveys.decide([candidate_of(layer, estimate)], SurveySetting(0, lambda layer, weight: 0.0))
    assert decided.rank is not None
    assert estimate.rank is not None
    assert decided.rank < estimate.rank / 2
    assert not METHOD.surveys.statistics(decided)
