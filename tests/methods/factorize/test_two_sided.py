"""two_sided: its error identity in inputs and outputs, what it wins over whitened, and ranks shared out by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.layer import Layer
from aicompress.methods.decisions import SurveySetting
from aicompress.methods.factorize import two_sided, whitened
from aicompress.methods.factorize.two_sided import METHOD, TwoSidedConfig
from aicompress.methods.factorize.weighting.roots import Root, Weighting
from aicompress.methods.factorize.whitened import WhitenedConfig
from aicompress.statistics import GradientStats
from aicompress.weights import Weight
from tests.methods.factorize.test_whitened import correlated, inputs_of
from tests.methods.layers import candidate_of, layer_of, randn


def layer_with(weight: Tensor, output_gram: Tensor | None, name: str = "layers.0.fc", seed: int = 0) -> Layer:
    zero = torch.zeros(weight.shape)
    graded = GradientStats(8, zero, zero, output_gram)
    return layer_of(weight, name, inputs_of(correlated(300, weight.shape[1], seed)), graded)


def output_gram(rows: int, seed: int = 7, tokens: int = 200) -> Tensor:
    gradients = correlated(tokens, rows, seed)
    return gradients.t() @ gradients / tokens


def lost(layer: Layer, weight: Weight) -> float:
    """tr(G E H Eᵀ)."""
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    assert layer.gradients is not None
    assert layer.gradients.output_gram is not None
    error = (layer.weight - weight.dense()).double()
    return float(((layer.gradients.output_gram.double() @ error @ layer.inputs.gram.double()) * error).sum())


def test_hand_computed() -> None:
    """Two weights of one size on white inputs: the one whose output the loss feels stays."""
    weight = torch.zeros(5, 5)
    weight[0, 0], weight[1, 1] = 2.0, 1.0
    gram = torch.diag(torch.tensor([1.0, 16.0, 1.0, 1.0, 1.0]))
    layer = layer_with(weight, gram)
    white = layer_of(weight, inputs=inputs_of(torch.eye(5)), gradients=layer.gradients)
    expected = torch.zeros(5, 5)
    expected[1, 1] = 1.0
    found = METHOD.apply(white, TwoSidedConfig(rank=1, damping=0, output_damping=0))
    assert torch.allclose(found.dense(), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
@pytest.mark.parametrize("tokens", [200, 9])
def test_loss_is_the_sum_of_dropped_squares_and_less_than_of_whitened(shape: tuple[int, int], tokens: int) -> None:
    layer = layer_with(randn(*shape, seed=3), output_gram(shape[0], tokens=tokens))
    config = TwoSidedConfig(rank=5, damping=0, output_damping=0)
    found = METHOD.apply(layer, config)
    weighting = Weighting(two_sided.inputs(layer, config), two_sided.outputs(layer, config))
    dropped = float(weighting.squares(layer.weight)[5:].sum())
    assert lost(layer, found) == pytest.approx(dropped, rel=2e-3, abs=1e-5 * float(weighting.squares(layer.weight)[0]))
    assert lost(layer, found) < lost(layer, whitened.METHOD.apply(layer, WhitenedConfig(rank=5, damping=0)))


@pytest.mark.parametrize("gram", [None, torch.zeros(24, 24)], ids=["not seen", "zero"])
def test_without_output_gradients_all_outputs_count_alike(gram: Tensor | None) -> None:
    layer = layer_with(randn(24, 40), gram)
    expected = whitened.METHOD.apply(layer, WhitenedConfig(rank=6)).dense()
    assert torch.equal(METHOD.apply(layer, TwoSidedConfig(rank=6)).dense(), expected)


def test_gradients_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CompressError, match=r"layers\.0\.fc: its gradients hold NaN"):
        METHOD.apply(layer_with(randn(24, 40), torch.full((24, 24), torch.nan)), TwoSidedConfig(rank=6))


def test_auto_needs_a_share_to_share_out() -> None:
    with pytest.raises(ValidationError, match="ranks: auto"):
        TwoSidedConfig(rank=3, ranks="auto")


def test_ranks_of_all_layers_are_one_pool_in_units_of_loss() -> None:
    """As many bytes as the same share of each, and less loss; where outputs matter more, the rank is higher."""
    grams = [output_gram(32, seed) * factor for seed, factor in ((11, 0.01), (12, 1.0), (13, 4.0))]
    layers = [layer_with(randn(32, 48, seed=n), gram, f"layers.{n}.fc", n) for n, gram in enumerate(grams)]
    assert METHOD.surveys is not None
    uniform = TwoSidedConfig(keep=0.6)
    candidates = [candidate_of(layer, TwoSidedConfig(keep=0.6, ranks="auto")) for layer in layers]
    decided = METHOD.surveys.decide(candidates, SurveySetting(0, lambda layer, weight: 0.0))
    sizes = [METHOD.outline(layer.info, config).numbers() for layer, config in zip(layers, decided, strict=True)]
    assert sum(sizes) <= sum(METHOD.outline(layer.info, uniform).numbers() for layer in layers)
    assert sum(sizes) > sum(METHOD.outline(layer.info, uniform).numbers() for layer in layers) - 80
    assert sizes[0] < sizes[1] <= sizes[2]
    total = [
        sum(lost(la, METHOD.apply(la, given)) for la, given in zip(layers, configs, strict=True))
        for configs in (decided, [uniform] * 3)
    ]
    assert total[0] < 0.8 * total[1]
    assert not any(METHOD.surveys.statistics(config) for config in decided)


def test_a_layer_that_no_gradient_reaches_counts_as_an_average_one() -> None:
    """Its error is in no unit of loss: it neither takes all ranks nor gives all away."""
    grams = [output_gram(32, 11) * 1e-4, torch.zeros(32, 32), output_gram(32, 12) * 1e-4]
    layers = [layer_with(randn(32, 48, seed=n), gram, f"layers.{n}.fc", n) for n, gram in enumerate(grams)]
    assert METHOD.surveys is not None
    candidates = [candidate_of(layer, TwoSidedConfig(keep=0.6, ranks="auto")) for layer in layers]
    decided = METHOD.surveys.decide(candidates, SurveySetting(0, lambda layer, weight: 0.0))
    assert 3 <= (decided[1].rank or 0) <= 19
    assert all((config.rank or 0) >= 3 for config in decided)


def test_without_outputs_the_moments_of_weights_give_their_diagonal() -> None:
    """As of experts in one tensor: rows whose gradients are large are kept better."""
    layer = layer_with(randn(24, 40), None)
    square = torch.ones(24, 40)
    square[:6] *= 100
    graded = replace(layer, gradients=GradientStats(8, torch.zeros(24, 40), square))
    errors = (METHOD.apply(graded, TwoSidedConfig(rank=6)).dense() - layer.weight).square().mean(dim=1)
    assert errors[:6].mean() < 0.3 * errors[6:].mean()


def test_a_root_of_a_diagonal_is_that_of_its_matrix() -> None:
    squares, x = torch.rand(12) + 0.1, randn(5, 12).double()
    full, diagonal = Root.of(torch.diag(squares), 0.1), Root.diagonal(squares, 0.1)
    assert torch.allclose(full.solve(x), diagonal.solve(x))
    for root in (full, diagonal):
        assert torch.allclose(root.undone(root.times(x)), x)
