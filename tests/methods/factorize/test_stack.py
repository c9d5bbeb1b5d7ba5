"""stack: its error identity, what it wins where layers look at the same directions, and who shares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.curvature import loss
from aicompress.methods.factorize import whitened
from aicompress.methods.factorize.stack import METHOD, StackConfig
from aicompress.methods.factorize.weighting.roots import Root, Weighting
from aicompress.statistics import GradientStats, InputStats
from aicompress.weights import Dense, LowRank, Weight, outline_nbytes
from tests.methods.layers import candidate_of, layer_of, randn

SHARES = METHOD.shares
assert SHARES is not None


def inputs(columns: int) -> InputStats:
    """Statistics of rows with a few strong directions."""
    rows = randn(200, columns) * torch.logspace(0, -2, columns) @ randn(columns, columns, seed=1)
    gram = rows.t() @ rows / len(rows)
    return InputStats.of(len(rows), gram, {}, gram)


def three(columns: int = 40, directions: int | None = None) -> list[Layer]:
    """Query, key and value, of 24, 12 and 12 rows, which look at all directions or at a few common ones."""
    stats = inputs(columns)
    common = torch.eye(columns) if directions is None else randn(directions, columns, seed=9)
    rows = {"q": 24, "k": 12, "v": 12}
    return [
        layer_of(randn(count, len(common), seed=count + ord(name)) @ common, f"layers.0.{name}", stats)
        for name, count in rows.items()
    ]


def error(layers: list[Layer], weights: list[Weight]) -> float:
    gram = inputs(layers[0].weight.shape[1]).gram
    assert gram is not None
    pairs = zip(layers, weights, strict=True)
    return sum(loss((layer.weight - weight.dense()).double(), gram.double()) for layer, weight in pairs)


def stored(weights: list[Weight]) -> int:
    """Bytes of all weights, what they share counted once."""
    first, *others = weights
    return outline_nbytes(first) + sum(outline_nbytes(each.parts()["out"]) for each in others)


def test_one_direction_in_common_is_held_exactly() -> None:
    """[1 2]ᵀ [1 1 0 0] and [3]ᵀ [1 1 0 0] at rank 1."""
    first = torch.tensor([[1.0, 1.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]])
    layers = [layer_of(first), layer_of(3 * first[:1])]
    weights = SHARES.compress(layers, StackConfig(rank=1, whiten=False))
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.allclose(weight.dense(), layer.weight, atol=1e-6)


@pytest.mark.parametrize("whiten", [True, False])
def test_the_error_of_all_layers_is_the_sum_of_dropped_squares(whiten: bool) -> None:
    layers = three()
    whole: Tensor = torch.cat([layer.weight for layer in layers])
    gram = inputs(40).gram if whiten else torch.eye(40)
    assert gram is not None
    squares = Weighting(Root.of(gram, 0.0)).squares(whole)
    for rank in (1, 7, 20):
        weights = SHARES.compress(layers, StackConfig(rank=rank, damping=0, shift=0, whiten=whiten, relative=False))
        assert all(isinstance(weight, LowRank) and weight.inner is weights[0].inner for weight in weights)
        off = torch.cat([layer.weight - weight.dense() for layer, weight in zip(layers, weights, strict=True)])
        assert loss(off.double(), gram.double()) == pytest.approx(float(squares[rank:].sum()), rel=1e-3)


def test_layers_that_look_at_common_directions_lose_less_in_the_same_bytes() -> None:
    layers = three(directions=16)
    apart = [whitened.METHOD.apply(layer, whitened.WhitenedConfig(keep=0.5)) for layer in layers]
    together = SHARES.compress(layers, StackConfig(keep=0.5))
    assert stored(together) <= sum(outline_nbytes(weight) for weight in apart) * 1.02
    assert error(layers, together) < 0.5 * error(layers, apart)


def test_gradients_weigh_the_outputs_of_each_layer() -> None:
    """Σ_i tr(G_i E_i H E_iᵀ) is the sum of dropped squares of [M_1 W_1; M_2 W_2; ...] S, the least of all factors."""
    graded = []
    for number, layer in enumerate(three()):
        rows = randn(60, len(layer.weight), seed=50 + number) * torch.logspace(0, -1, len(layer.weight))
        graded.append(replace(layer, gradients=GradientStats(60, output_gram=rows.t() @ rows / 60)))
    gram = inputs(40).gram.double()

    def lost(config: StackConfig) -> float:
        total = 0.0
        for layer, weight in zip(graded, SHARES.compress(graded, config), strict=True):
            off = (layer.weight - weight.dense()).double()
            total += float((layer.gradients.output_gram.double() @ off @ gram * off).sum())
        return total

    roots = [Root.of(layer.gradients.output_gram, 0.0) for layer in graded]
    weighed = torch.cat([root.times(layer.weight.t().double()).t() for root, layer in zip(roots, graded, strict=True)])
    squares = Weighting(Root.of(gram, 0.0)).squares(weighed)
    given = {"rank": 9, "damping": 0, "shift": 0}
    least = lost(StackConfig(gradients=True, output_damping=0, **given))
    assert least == pytest.approx(float(squares[9:].sum()), rel=1e-3)
    assert least < 0.9 * lost(StackConfig(**given))


def test_a_layer_of_small_outputs_is_not_given_up() -> None:
    """Values a hundredth of the queries' size lose a part as large as theirs."""
    layers = three()
    small = [*layers[:2], replace(layers[2], weight=layers[2].weight / 100)]
    parts = {}
    for relative in (True, False):
        weights = SHARES.compress(small, StackConfig(keep=0.6, relative=relative))
        parts[relative] = error(small[2:], weights[2:]) / loss(small[2].weight, inputs(40).gram)
    assert parts[True] < 0.5 * parts[False]


def test_a_layer_alone_is_whitened() -> None:
    layer = three()[0]
    wanted = whitened.METHOD.apply(layer, whitened.WhitenedConfig(keep=0.5))
    assert torch.allclose(METHOD.apply(layer, StackConfig(keep=0.5)).dense(), wanted.dense(), atol=1e-6)


def test_layers_that_it_would_not_shrink_stay_dense() -> None:
    for columns, rank in ((40, 30), (1, 1)):
        layers = three(columns)
        weights = SHARES.compress(layers, StackConfig(rank=rank))
        assert all(isinstance(weight, Dense) for weight in weights)
        assert error(layers, weights) == 0
    zero = [replace(layer, weight=torch.zeros_like(layer.weight)) for layer in three()]
    assert not any(weight.dense().any() for weight in SHARES.compress(zero, StackConfig(keep=0.5)))


def test_who_shares() -> None:
    """Layers of one input in one block, with one config and dtype."""
    layers = three()
    half = layer_of(layers[0].weight.half(), "layers.0.gate", layers[0].inputs)
    later = layer_of(layers[0].weight, "layers.1.q", layers[0].inputs)
    config, other = StackConfig(keep=0.5), StackConfig(keep=0.6)
    given = [(layers[0], config), (later, config), (layers[1], config), (layers[2], other), (half, config)]
    candidates = [replace(candidate_of(layer, its), input_name=lambda: "layers.0.k") for layer, its in given]
    assert SHARES.groups(candidates) == [[0, 2]]
    assert SHARES.groups([candidate_of(layer, config) for layer in layers]) == []
