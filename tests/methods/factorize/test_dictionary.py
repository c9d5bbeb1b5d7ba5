"""dictionary: an exact case, that rounds never lose, what it wins over whitened factors in as many bytes, and sizes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from aicompress.layer import InputStats, Layer
from aicompress.methods.curvature import loss
from aicompress.methods.factorize import whitened
from aicompress.methods.factorize.dictionary import METHOD, DictionaryConfig, Size, dictionary, largest, size_of
from aicompress.weights import Dense, LowRank, Sparse, Weight, outline_nbytes
from tests.methods.layers import info_of, layer_of, randn


def inputs_of(rows: Tensor) -> InputStats:
    gram = rows.t() @ rows / len(rows)
    return InputStats(len(rows), gram, gram.diagonal().clone(), cross=gram)


def error(layer: Layer, weight: Weight) -> float:
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    return loss(layer.weight - weight.dense(), layer.inputs.gram.double())


def test_rows_that_are_multiples_of_orthogonal_directions_are_found() -> None:
    """16 rows, each along one of 4 orthogonal directions: 16 numbers and 4 directions are all of it."""
    basis = torch.linalg.qr(randn(24, 4))[0].t().double()  # (4, 24)
    rows = basis.repeat(4, 1) * torch.linspace(1, 3, 16, dtype=torch.float64)[:, None]
    atoms = dictionary(rows, Size(4, 16), 30)
    coefficients, mask = largest(rows @ atoms.t(), 16)
    assert torch.allclose(atoms @ atoms.t(), torch.eye(4, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(coefficients @ atoms, rows, atol=1e-6)
    assert mask.sum() == 16


def test_no_round_loses() -> None:
    rows = randn(48, 32).double() @ randn(32, 32, seed=1).double()

    def lost(rounds: int) -> float:
        atoms = dictionary(rows, Size(20, 400), rounds)
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
    for keep in (0.3, 0.7, 1.0):
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
    weight = METHOD.apply(layer, DictionaryConfig())
    assert torch.equal(weight.dense(), layer.weight)
    assert "kept dense" in METHOD.describe(DictionaryConfig(), weight)["note"]


def test_fewer_tokens_than_columns_and_float16() -> None:
    """Inputs of 1e-6 and outputs of 1e4 leave both parts in range; a row of zeros stays zero."""
    matrix = 1e4 * randn(40, 24)
    matrix[3] = 0
    layer = layer_of(matrix.half(), inputs=inputs_of(randn(7, 24) * 1e-6))
    weight = METHOD.apply(layer, DictionaryConfig())
    assert torch.isfinite(weight.dense()).all()
    assert not weight.dense()[3].any()
    assert METHOD.apply(layer, DictionaryConfig(damping=0)).specs() == weight.specs()


def test_a_factor_is_refused() -> None:
    factors = LowRank(Dense(randn(16, 2)), Dense(randn(2, 16)))
    problem = METHOD.check(info_of(factors), DictionaryConfig())
    assert problem is not None
    assert "factor" in problem[0]
