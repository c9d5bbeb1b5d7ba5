"""dictionary: an exact case, that rounds never lose, what it wins over whitened factors in as many bytes, and sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.curvature import loss
from aicompress.methods.decisions import SurveySetting
from aicompress.methods.factorize import whitened
from aicompress.methods.factorize.dictionary import (
    METHOD,
    DictionaryConfig,
    DictionarySize,
    dictionary,
    largest,
    size_of,
)
from aicompress.statistics import InputStats
from aicompress.weights import Dense, LowRank, Sparse, Weight, outline_nbytes
from tests.methods.layers import candidate_of, info_of, layer_of, randn


def inputs_of(rows: Tensor) -> InputStats:
    gram = rows.t() @ rows / len(rows)
    return InputStats.of(len(rows), gram, {}, gram)


def error(layer: Layer, weight: Weight) -> float:
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    return loss(layer.weight - weight.dense(), layer.inputs.gram.double())


def test_rows_that_are_multiples_of_orthogonal_directions_are_found() -> None:
    """16 rows, each along one of 4 orthogonal directions: 16 numbers and 4 directions are all of it."""
    basis = torch.linalg.qr(randn(24, 4))[0].t().double()  # (4, 24)
    rows = basis.repeat(4, 1) * torch.linspace(1, 3, 16, dtype=torch.float64)[:, None]
    atoms = dictionary(rows, DictionarySize(4, 16), 30)
    coefficients, mask = largest(rows @ atoms.t(), 16)
    assert torch.allclose(atoms @ atoms.t(), torch.eye(4, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(coefficients @ atoms, rows, atol=1e-6)
    assert mask.sum() == 16


def test_no_round_loses() -> None:
    rows = randn(48, 32).double() @ randn(32, 32, seed=1).double()

    def lost(rounds: int) -> float:
        atoms = dictionary(rows, DictionarySize(20, 400), rounds)
        return float((rows - largest(rows @ atoms.t(), 400)[0] @ atoms).square().sum())

    errors = [lost(rounds) for rounds in range(6)]
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_less_output_error_than_whitened_factors_in_as_many_bytes() -> None:
    """Where singular values fall off slowly, as those of weights do."""
    inputs = inputs_of(randn(400, 64, seed=1) * torch.logspace(0, -1, 64) @ randn(64, 64, seed=2))
    layer = layer_of(randn(96, 64).bfloat16(), inputs=inputs)
    for keep in (0.8, 0.5):
        theirs = whitened.METHOD.apply(layer, whitened.WhitenedConfig(keep=keep))
        ours = METHOD.apply(layer, DictionaryConfig(keep=outline_nbytes(theirs) / layer.info.nbytes))
        assert outline_nbytes(ours) <= outline_nbytes(theirs)
        assert error(layer, ours) < 0.9 * error(layer, theirs)


def test_all_bytes_of_the_share_are_used() -> None:
    layer = layer_of(randn(40, 56).bfloat16(), inputs=inputs_of(randn(90, 56)))
    for keep in (0.3, 0.7, 0.99):
        weight = METHOD.apply(layer, DictionaryConfig(keep=keep, rounds=1))
        assert isinstance(weight, LowRank)
        assert isinstance(weight.out, Sparse)
        assert int(keep * layer.info.nbytes) - 2 < outline_nbytes(weight) <= keep * layer.info.nbytes
    narrow = size_of(info_of(Dense(torch.zeros(8, 64))), DictionaryConfig(keep=0.5, multiple=2))
    assert narrow is not None
    assert narrow.atoms % 2 == 0


@pytest.mark.parametrize("shape", [(1, 64), (1, 2)])
def test_a_layer_that_would_not_shrink_stays(shape: tuple[int, int]) -> None:
    layer = layer_of(randn(*shape), inputs=inputs_of(randn(5, shape[1])))
    weight = METHOD.apply(layer, DictionaryConfig(keep=0.8))
    assert torch.equal(weight.dense(), layer.weight)
    assert "kept dense" in METHOD.describe(DictionaryConfig(keep=0.8), weight)["note"]


def test_fewer_tokens_than_columns_and_float16() -> None:
    """Inputs of 1e-6 and outputs of 1e4 leave both parts in range; a row of zeros stays zero."""
    matrix = 1e4 * randn(40, 24)
    matrix[3] = 0
    layer = layer_of(matrix.half(), inputs=inputs_of(randn(7, 24) * 1e-6))
    weight = METHOD.apply(layer, DictionaryConfig(keep=0.8))
    assert torch.isfinite(weight.dense()).all()
    assert not weight.dense()[3].any()
    assert METHOD.apply(layer, DictionaryConfig(keep=0.8, damping=0)).specs() == weight.specs()


def test_a_factor_is_refused() -> None:
    factors = LowRank(Dense(randn(16, 2)), Dense(randn(2, 16)))
    problem = METHOD.check(info_of(factors), DictionaryConfig(keep=0.8))
    assert problem is not None
    assert "factor" in problem[0]


def decided(
    layers: Sequence[Layer], divergence: Callable[[Any], float] = lambda configs: 0.0, **target: Any
) -> list[Any]:
    assert METHOD.allocates is not None
    assert METHOD.surveys is not None
    config = DictionaryConfig(rounds=0, shift=0, **target)
    candidates = [candidate_of(layer, config) for layer in layers]
    open_yet = METHOD.allocates.resolve(candidates, 1000)
    assert all(each.keep is not None and each.shared_out for each in open_yet)
    candidates = [replace(each, config=config) for each, config in zip(candidates, open_yet, strict=True)]
    return METHOD.surveys.decide(candidates, SurveySetting(1000, lambda layer, weight: 0.0, divergence=divergence))


def unlike() -> list[Layer]:
    """One whose singular values fall off, one where none do, one that is narrow, and one that cannot shrink."""
    inputs = inputs_of(randn(90, 64, seed=5))
    matrices = [randn(48, 64) * torch.logspace(0, -2, 64), randn(48, 64, seed=1), randn(4, 64), randn(1, 64)]
    return [layer_of(matrix, inputs=inputs) for matrix in matrices]


def test_bytes_go_where_they_remove_most_error() -> None:
    layers = unlike()
    budget = 1000 + int(0.6 * sum(layer.info.nbytes for layer in layers))
    configs = decided(layers, target_bytes=budget)
    weights = [METHOD.apply(layer, config) for layer, config in zip(layers, configs, strict=True)]
    taken = 1000 + sum(outline_nbytes(weight) for weight in weights)
    assert 0.95 * budget < taken <= budget
    assert configs[0].keep < configs[1].keep
    assert isinstance(weights[3], Dense)
    alike = [METHOD.apply(layer, DictionaryConfig(keep=0.6, rounds=0, shift=0)) for layer in layers]
    ours, theirs = (sum(map(error, layers, each)) for each in (weights, alike))
    assert ours < 0.8 * theirs


def test_a_divergence_is_reached_by_shares_that_are_tried() -> None:
    """Where what the model loses is the layers' error: the bound holds, and most of it is used."""
    layers = unlike()[:2]

    def lost(configs: Sequence[DictionaryConfig]) -> float:
        return sum(error(layer, METHOD.apply(layer, each)) for layer, each in zip(layers, configs, strict=True))

    limit = 0.5 * lost([DictionaryConfig(keep=0.3, rounds=0, shift=0)] * 2)
    assert 0.7 * limit < lost(decided(layers, lost, max_kl=limit)) <= limit


def test_exactly_one_says_how_many_bytes() -> None:
    for fields in ({}, {"keep": 0.5, "max_kl": 0.1}):
        with pytest.raises(ValidationError, match="exactly one of keep, target_bytes, max_kl"):
            DictionaryConfig.model_validate(fields)
