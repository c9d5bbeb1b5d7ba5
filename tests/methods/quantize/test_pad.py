"""A last group that is narrower than the others: `pad: true`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aicompress.layer import Layer
from aicompress.methods import get
from aicompress.methods.curvature import loss
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.quantize.grid.integer import IntegerConfig
from aicompress.methods.quantize.rtn import RtnConfig
from aicompress.methods.zeros import zeroed
from aicompress.weights import IntGrouped, SparseCodes, Weight, restore
from tests.methods.contract import LAYERWISE, resolved, statistics
from tests.methods.layers import layer_of, randn

INTEGER = [method for method in LAYERWISE if issubclass(method.config, IntegerConfig | RtnConfig)]


def applied(method: LayerMethod, layer: Layer, **fields: Any) -> Weight:
    config = resolved(method, layer, fields)
    assert config is not None
    found = method.apply(layer, config)
    assert found.specs() == method.outline(layer.info, config).specs()
    assert torch.equal(restore(found.tensors(), found.meta()).dense(), found.dense())
    return found


def test_by_hand() -> None:
    """Groups of 4 in 6 columns: 8 bits, scales absmax / 127.5."""
    layer = layer_of(torch.tensor([[1.0, -2.0, 0.75, 127.5, 0.25, -31.875]]))
    method: Any = get("quantize", "rtn")
    found: Any = applied(method, layer, bits=8, group_size=4, pad=True, scale_dtype="float32")
    assert found.scale.tolist() == [[1.0, 0.25]]
    assert found.codes.tolist() == [[1, -2, 1, 127, 1, -128]]
    assert found.dense().tolist() == [[1.0, -2.0, 1.0, 127.0, 0.25, -32.0]]


def test_without_it_the_sizes_that_fit_are_named() -> None:
    method: Any = get("quantize", "rtn")
    message, hint = method.check(layer_of(torch.ones(4, 96)).info, method.config(group_size=64))
    assert "group_size 64 does not divide its 96 input columns" in message
    assert hint == "sizes that fit: 8, 12, 16, 24, 32, 48, 96; or granularity: channel; or pad: true"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", INTEGER, ids=lambda method: method.name)
def test_every_method_gains_by_a_narrow_group_of_its_own(method: LayerMethod, bits: int) -> None:
    """Small columns, 8 of them, behind two groups of 16: less output error than with one scale for the row."""
    inputs = statistics(40, torch.Generator().manual_seed(3))
    layer = layer_of(randn(8, 40) * torch.tensor([1.0] * 32 + [0.05] * 8), inputs=inputs if method.needs else None)
    found = applied(method, layer, bits=bits, group_size=16, pad=True)
    assert found.shape == (8, 40)
    assert found.tensors()["scale"].shape == (8, 3)
    hessian = inputs.gram if method.needs else torch.eye(40)
    assert hessian is not None
    losses = [
        loss(layer.weight - weight.dense(), hessian)
        for weight in (found, applied(method, layer, bits=bits, granularity="channel"))
    ]
    assert losses[0] < losses[1]


def test_masks_and_sparse_codes() -> None:
    codes = torch.randint(-8, 8, (4, 10), dtype=torch.int8)
    zero = torch.randint(-8, 8, (4, 3), dtype=torch.int8)
    weight = IntGrouped(codes, torch.rand(4, 3).half() + 0.1, zero, 4, 4)
    mask = torch.rand(4, 10) < 0.5
    assert torch.equal(zeroed(weight, mask).dense(), weight.dense() * mask)
    sparse = SparseCodes.of(weight, mask)
    assert torch.equal(restore(sparse.tensors(), sparse.meta()).dense(), weight.dense() * mask)


def test_rows_decode_as_the_whole() -> None:
    weight = IntGrouped(torch.randint(-8, 8, (6, 10), dtype=torch.int8), torch.rand(6, 3), None, 4, 4)
    assert torch.equal(weight.rows(2, 5), weight.dense()[2:5])
    by_hand = weight.codes.float() * torch.cat([weight.scale[:, [g]].expand(6, w) for g, w in enumerate((4, 4, 2))], 1)
    assert torch.equal(weight.dense(), by_hand)
