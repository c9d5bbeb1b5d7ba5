"""Zeros among integer codes: kept through quantization, made up for, and stored as survivors alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from aicompress.layer import Layer
from aicompress.methods import get
from aicompress.methods.curvature import damped
from aicompress.methods.curvature import loss as loss_of
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.zeros import descended, kept_zero, outline_of, zeroed
from aicompress.weights import IntGrouped, Sparse, SparseCodes, Weight, outline_nbytes
from tests.methods.layers import randn
from tests.methods.prune.gram import calibrated, loss


def coded(layer: Layer, **fields: object) -> Weight:
    method = get("quantize", "rtn")
    assert isinstance(method, LayerMethod)
    config = method.config.model_validate({"name": "rtn", **fields})
    weight = method.apply(layer, config)
    found = kept_zero(layer, weight)
    assert found.specs() == outline_of(layer.info, method.outline(layer.info, config)).specs()
    return found


def sparse_layer(share: float = 0.5, inputs: bool = True) -> Layer:
    matrix = randn(24, 64, seed=5)
    mask = randn(24, 64, seed=6) > torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(share))
    layer = calibrated(stored=Sparse.of(matrix, mask))
    return layer if inputs else dataclasses.replace(layer, inputs=None)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_sparse_layer_keeps_its_zeros_and_stores_survivors_alone(symmetric: bool) -> None:
    layer = sparse_layer(inputs=False)
    weight = coded(layer, bits=4, group_size=16, symmetric=symmetric)
    assert isinstance(weight, SparseCodes)
    assert isinstance(layer.stored, Sparse)
    assert torch.equal(weight.mask, layer.stored.mask)
    assert torch.equal(weight.dense()[~weight.mask], torch.zeros(int((~weight.mask).sum())))


def test_bytes_are_a_bit_per_weight_and_the_survivors_codes() -> None:
    layer = sparse_layer(0.7, inputs=False)
    weight = coded(layer, bits=4, group_size=16)
    kept = weight.numbers()
    words = -(-kept * 4 // 32)
    assert outline_nbytes(weight) == 24 * 64 // 8 + 4 * words + 2 * 24 * 4


def test_two_bits_at_half_the_weights_are_smaller_with_all_codes() -> None:
    weight = coded(sparse_layer(0.45, inputs=False), bits=2, group_size=16)
    assert isinstance(weight, IntGrouped)
    assert float((weight.dense() == 0).float().mean()) > 0.4


def test_survivors_make_up_for_zeros_where_the_gram_matrix_is_known() -> None:
    known, unknown = (coded(sparse_layer(inputs=inputs), bits=3, group_size=16) for inputs in (True, False))
    layer = sparse_layer()
    assert isinstance(known, SparseCodes)
    assert loss(layer, known) < loss(layer, unknown)


def test_no_step_of_the_descent_can_raise_the_loss() -> None:
    layer = calibrated()
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    gram = damped(layer.inputs.gram.double(), 0.01)
    codes = torch.randint(-8, 8, (24, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    start = IntGrouped(codes, torch.full((24, 4), 0.3), None, 4, 16)
    mask = randn(24, 64, seed=8) > 0
    found = descended(layer.weight, start, mask, gram.float())
    before = loss_of(layer.weight - zeroed(start, mask).dense(), gram)
    assert loss_of(layer.weight - found.dense(), gram) < before
    assert torch.equal(found.dense()[~mask], torch.zeros(int((~mask).sum())))


def test_hand_computed_descent() -> None:
    """w = [1, 1], H = [[2, 1], [1, 2]], column 1 pruned, steps of 1/2: column 0 goes to 1 + 1/2."""
    start = IntGrouped(torch.tensor([[2, 2]], dtype=torch.int8), torch.tensor([[0.5]]), None, 4)
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found = descended(torch.tensor([[1.0, 1.0]]), start, torch.tensor([[True, False]]), hessian)
    assert torch.equal(found.dense(), torch.tensor([[1.5, 0.0]]))


def test_real_zero_points_are_left_alone() -> None:
    """No code stands for exactly zero then."""
    layer = sparse_layer(inputs=False)
    weight = IntGrouped(torch.zeros(24, 64, dtype=torch.int8), torch.ones(24, 1), torch.full((24, 1), 0.4), 4)
    assert kept_zero(layer, weight) is weight
