"""residual: its low-rank part by hand, what it wins over codes alone and over a correction alone, and narrow layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.curvature import loss
from aicompress.methods.factorize.residual import METHOD, ResidualConfig
from aicompress.methods.quantize.rtn import METHOD as RTN
from aicompress.statistics import InputStats
from aicompress.weights import Corrected, Weight, outline_nbytes
from tests.methods.layers import layer_of, randn

BASE = {"name": "rtn", "bits": 3, "granularity": "group", "group_size": 16}


def inputs_of(rows: Tensor) -> InputStats:
    gram = rows.t() @ rows / len(rows)
    return InputStats.of(len(rows), gram, {}, gram)


def directed(strong: int, out: int = 64, columns: int = 64) -> Layer:
    """Gaussian weights with a few directions that are far stronger."""
    weight = randn(out, columns) + 6 * randn(out, strong, seed=1) @ randn(strong, columns, seed=2)
    return layer_of(weight, inputs=inputs_of(randn(500, columns, seed=3) @ randn(columns, columns, seed=4)))


def error(layer: Layer, weight: Weight) -> float:
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    return loss(layer.weight - weight.dense(), layer.inputs.gram.double())


def found(layer: Layer, **fields: Any) -> Corrected:
    weight = METHOD.apply(layer, ResidualConfig(**{"base": BASE, **fields}))
    assert isinstance(weight, Corrected)
    return weight


def test_a_direction_that_is_kept_leaves_nothing_to_quantize() -> None:
    """W = u vᵀ: with one direction kept the codes are those of zero, and rank 1 is all of W."""
    layer = layer_of(torch.outer(randn(16), randn(32, seed=1)), inputs=inputs_of(randn(100, 32)))
    weight = found(layer, rank=1, preserve=1)
    assert float(weight.base.dense().norm() / layer.weight.norm()) < 1e-5
    assert torch.allclose(weight.dense(), layer.weight, atol=5e-3)


def test_a_few_strong_directions_are_worth_more_than_bits() -> None:
    """Less output error than codes of more bits that take as many bytes, where codes alone have to span it all."""
    layer = directed(strong=3)
    more = RTN.apply(layer, RTN.config(**{**BASE, "bits": 4}))  # type: ignore[arg-type]
    weight = found(layer, rank=3)
    assert outline_nbytes(weight) <= outline_nbytes(more) + 2 * 3 * 128 - 512
    assert error(layer, weight) < 0.3 * error(layer, more)


@pytest.mark.parametrize("strong", [0, 3])
def test_never_more_error_than_codes_of_the_same_bits_or_a_correction_of_the_rank(strong: int) -> None:
    layer = directed(strong)
    plain = error(layer, RTN.apply(layer, RTN.config(**BASE)))  # type: ignore[arg-type]
    corrected = error(layer, found(layer, rank=4, preserve=0))
    best = error(layer, found(layer, rank=4, damping=0))
    assert best <= corrected < plain
    assert strong == 0 or best < 0.5 * corrected


@pytest.mark.parametrize(
    ("shape", "dtype", "rank"),
    [((4, 64), torch.float32, 4), ((4, 64), torch.bfloat16, 0), ((1, 64), torch.bfloat16, 0), ((64, 1), torch.half, 0)],
    ids=str,
)
def test_narrow_layers_take_what_rank_they_have_or_stay(shape: tuple[int, int], dtype: torch.dtype, rank: int) -> None:
    layer = layer_of(randn(*shape).to(dtype), inputs=inputs_of(randn(5, shape[1])))  # fewer tokens than columns
    config = ResidualConfig(rank=100, base={"name": "rtn", "bits": 4, "granularity": "channel"})
    weight = METHOD.apply(layer, config)
    assert weight.specs() == METHOD.outline(layer.info, config).specs()
    if isinstance(weight, Corrected):
        assert weight.correction.rank == rank
    else:
        assert not rank
        assert torch.equal(weight.dense(), layer.weight)
        assert "kept dense" in METHOD.describe(config, weight)["note"]


def test_what_is_compressed_already_must_not_grow() -> None:
    layer = layer_of(RTN.apply(layer_of(randn(16, 32)), RTN.config(**BASE)))  # type: ignore[arg-type]
    problem = METHOD.check(layer.info, ResidualConfig(base=BASE))
    assert problem is not None
    assert "it would take" in problem[0]
