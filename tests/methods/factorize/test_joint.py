"""joint: attentions that compute the same where nothing is lost, the closed form's error, and what biases do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.factorize.heads.bases import directions
from aicompress.methods.factorize.joint import METHOD, JointConfig, compress, member_outline
from aicompress.methods.head_products import HeadProduct
from aicompress.statistics import InputStats
from aicompress.weights import Submatrix, Weight
from tests.methods.layers import layer_of, randn

HEADS, GROUPS, WIDTH, HIDDEN, TOKENS = 4, 2, 8, 40, 12


def product_of(kind: Any, heads: int, groups: int, width: int, units: Any = ()) -> HeadProduct:
    return HeadProduct(kind, ("first.weight", "second.weight"), ("", ""), heads, groups, width, units)


def inputs_of(rows: Tensor) -> InputStats:
    gram = rows.t() @ rows / len(rows)
    return InputStats.of(len(rows), gram, {}, gram)


def low_rank(out: int, columns: int, rank: int, heads: int, seed: int) -> Tensor:
    """Heads one below the other, each of a rank."""
    mixing = randn(heads, out // heads, rank, seed=seed)
    return (mixing @ randn(heads, rank, columns, seed=seed + 1)).flatten(0, 1)


def mixed(values: Tensor, heads: int, seed: int = 9) -> Tensor:
    """(tokens, heads width): every query head's own mixture over the tokens of its group's values; weights add to 1."""
    tokens, groups = len(values), values.shape[1] // WIDTH
    weights = randn(heads, tokens, tokens, seed=seed).softmax(-1)
    own = values.view(tokens, groups, WIDTH).repeat_interleave(heads // groups, dim=1)
    return torch.einsum("hqk,khd->qhd", weights, own).flatten(1)


def named(first: Layer, second: Layer) -> list[Layer]:
    """The members of a product as they are called."""
    return [
        replace(layer, info=replace(layer.info, tensor=f"{name}.weight"))
        for layer, name in ((first, "first"), (second, "second"))
    ]


def coupled(product: HeadProduct, layers: list[Layer], biases: Any = (None, None), **fields: Any) -> list[Weight]:
    config = JointConfig(**{"damping": 0.0, "shift": 0.0, **fields})
    weights = compress(product, layers, biases, config)
    planned = [member_outline(product, layer.info, config) for layer in layers]
    assert [weight.specs() for weight in weights] == [outline.specs() for outline in planned]
    assert all(isinstance(weight, Submatrix) for weight in weights)
    return weights


@pytest.mark.parametrize("bias", [None, randn(GROUPS * WIDTH, seed=5)], ids=["plain", "biased"])
def test_values_of_few_directions_lose_nothing(bias: Tensor | None) -> None:
    """Heads of rank 3 keep 4 of 8 directions: one for a bias, which stays, and all that was given."""
    x = randn(TOKENS, HIDDEN)
    value = low_rank(GROUPS * WIDTH, HIDDEN, 3, GROUPS, 1)
    output = randn(HIDDEN, HEADS * WIDTH, seed=3)
    added = torch.zeros(GROUPS * WIDTH) if bias is None else bias
    given = mixed(x @ value.t() + added, HEADS)
    product = product_of("values", HEADS, GROUPS, WIDTH)
    layers = named(layer_of(value, inputs=inputs_of(x)), layer_of(output, inputs=inputs_of(given)))
    new_value, new_output = coupled(product, layers, (bias, None), keep=0.5)
    again = mixed(x @ new_value.dense().t() + added, HEADS) @ new_output.dense().t()
    assert torch.allclose(again, given @ output.t(), atol=1e-2)
    assert new_value.numbers() == value.numel() // 2
    assert new_output.numbers() == output.numel() // 2


def test_the_output_error_is_least_of_all_directions() -> None:
    """Of one head its inputs' and outputs' moments give the error in closed form: Σ_{i>r} σ_i² of G^½ C^½."""
    x, output = randn(50, WIDTH) * torch.logspace(0, -1, WIDTH), randn(HIDDEN, WIDTH, seed=1)
    product = product_of("values", 1, 1, WIDTH)
    layers = named(layer_of(torch.eye(WIDTH), inputs=inputs_of(x)), layer_of(output, inputs=inputs_of(x)))
    value, new = coupled(product, layers, keep=0.5)
    error = (x @ output.t() - x @ value.dense().t() @ new.dense().t()).square().sum(1).mean()
    squares = torch.linalg.svdvals(output @ torch.linalg.cholesky(x.t() @ x / len(x))).square()
    assert float(error) == pytest.approx(float(squares[WIDTH // 2 :].sum()), rel=1e-3)


@pytest.mark.parametrize("biased", [False, True])
def test_scores_of_few_directions_lose_nothing(biased: bool) -> None:
    """Without a rotary embedding; what a key's bias adds to a score is the same for all keys."""
    x = randn(TOKENS, HIDDEN)
    query, key = randn(2 * WIDTH, HIDDEN, seed=2), low_rank(2 * WIDTH, HIDDEN, 3, 2, 4)
    biases = [randn(2 * WIDTH, seed=seed) if biased else None for seed in (6, 7)]
    product = product_of("scores", 2, 2, WIDTH)
    layers = named(*(layer_of(matrix, inputs=inputs_of(x)) for matrix in (query, key)))
    new = coupled(product, layers, biases, keep=0.5)

    def attention(matrices: list[Tensor]) -> Tensor:
        rows = [x @ m.t() + (0 if b is None else b) for m, b in zip(matrices, biases, strict=True)]
        q, k = (r.view(TOKENS, 2, WIDTH).transpose(0, 1) for r in rows)
        return (q @ k.transpose(1, 2)).softmax(-1)

    assert torch.allclose(attention([weight.dense() for weight in new]), attention([query, key]), atol=2e-3)


def test_pairs_that_hold_least_of_query_and_key_go_from_all_heads_of_a_group() -> None:
    units = tuple((pair, pair + 4) for pair in range(4))
    product = product_of("scores", HEADS, GROUPS, WIDTH, units)
    query, key = torch.ones(HEADS * WIDTH, HIDDEN), torch.ones(GROUPS * WIDTH, HIDDEN)
    query.view(HEADS, WIDTH, HIDDEN)[:, 1] = query.view(HEADS, WIDTH, HIDDEN)[:, 5] = 0.1  # small in all queries
    key.view(GROUPS, WIDTH, HIDDEN)[0, [2, 6]] = 0.1  # in the keys of the first group
    key.view(GROUPS, WIDTH, HIDDEN)[1, [0, 4]] = 0.1
    layers = named(*(layer_of(matrix, inputs=inputs_of(randn(50, HIDDEN))) for matrix in (query, key)))
    assert member_outline(product, layers[0].info, JointConfig(keep=0.5)).form == "dense"  # pairs have to be asked for
    new = coupled(product, layers, scores=0.5)
    for weight, old in zip(new, (query, key), strict=True):
        heads = len(old) // WIDTH
        rows = weight.dense().view(heads, WIDTH, HIDDEN)
        alive = [{row for row in range(WIDTH) if rows[head, row].any()} for head in range(heads)]
        assert alive == [{0, 3, 4, 7} if head < heads // 2 else {2, 3, 6, 7} for head in range(heads)]
        assert torch.equal(rows[rows != 0], old.view(heads, WIDTH, HIDDEN)[rows != 0])


def test_zero_matrices_and_few_tokens() -> None:
    x = randn(3, HIDDEN)
    for kind, shape in (("values", (HIDDEN, HEADS * WIDTH)), ("scores", (GROUPS * WIDTH, HIDDEN))):
        first = torch.zeros(GROUPS * WIDTH if kind == "values" else HEADS * WIDTH, HIDDEN)
        given = randn(3, shape[1])
        layers = named(layer_of(first, inputs=inputs_of(x)), layer_of(torch.zeros(shape), inputs=inputs_of(given)))
        product = product_of(kind, HEADS, GROUPS, WIDTH)
        assert not any(weight.dense().any() for weight in coupled(product, layers, keep=0.25))


def test_directions_are_those_that_count_and_are_seen_in_any_group() -> None:
    seen = [torch.diag(torch.tensor([4.0, 1.0, 1.0])).double(), torch.diag(torch.tensor([1.0, 2.0, 3.0])).double()]
    counted = [torch.diag(torch.tensor([1.0, 9.0, 1.0])).double(), 0.1 * torch.eye(3).double()]
    first, second = directions(counted, seen, 3)
    assert torch.allclose(first.abs(), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]).double(), atol=1e-9)
    assert torch.allclose(second.abs(), torch.tensor([[0.0, 0.0, 1.0]]).double(), atol=1e-9)


def test_all_kept_is_the_layer_itself() -> None:
    layers = named(layer_of(randn(16, HIDDEN)), layer_of(randn(HIDDEN, 16)))
    product = product_of("values", 2, 2, WIDTH)
    weights = compress(product, layers, (None, None), JointConfig(keep=1))
    assert all(torch.equal(weight.dense(), layer.weight) for weight, layer in zip(weights, layers, strict=True))
    assert METHOD.couples is not None
