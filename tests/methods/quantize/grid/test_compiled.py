"""The compiled passes give what torch gives: the same codes, scales and streams, to the bit; also without numba."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.measure import squared_sums
from aicompress.methods.quantize import rtn
from aicompress.methods.quantize.grid import compiled
from aicompress.methods.quantize.rtn import RtnConfig
from aicompress.weights import Dense, IntGrouped

CONFIGS: tuple[dict[str, Any], ...] = (
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 8, "symmetric": False},
    {"bits": 3, "group_size": 32, "symmetric": False},
    {"bits": 2, "group_size": 16, "scale_dtype": "float32"},
    {"bits": 8, "granularity": "channel"},
    {"bits": 8, "granularity": "channel", "symmetric": False},
    {"preset": "W8A8"},
    {"bits": 4, "group_size": 48, "pad": True},
    {"bits": 4, "group_size": 48, "pad": True, "symmetric": False},
    {"bits": 2, "group_size": 37},  # rows that no word divides
)


@pytest.fixture(params=["interpreted", "compiled"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> compiled.Kernels:
    """The same functions, as Python runs them and as numba compiles them."""
    found = compiled.Kernels() if request.param == "interpreted" else compiled.kernels()
    assert found is not None, "the dev extra installs numba"
    monkeypatch.setattr(rtn, "kernels", lambda: found)
    return found


def weight(columns: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of zeros, of one sign, of one value and of tiny ones among others; minus zero too."""
    matrix = torch.randn(12, columns, generator=torch.Generator().manual_seed(columns)) * 0.02
    matrix[1] = 0
    matrix[2], matrix[3] = matrix[2].abs(), -matrix[3].abs()
    matrix[4], matrix[5, ::2] = 0.5, -0.0
    matrix[6] *= 1e-4
    matrix[7, 3] = 100
    return matrix.to(dtype)


def info_of(matrix: Tensor) -> LayerInfo:
    shape = (matrix.shape[0], matrix.shape[1])
    return LayerInfo("layer", "layer.weight", "linear", shape, shape, matrix.dtype)


def both(matrix: Tensor, config: RtnConfig) -> tuple[Any, IntGrouped]:
    applied = rtn.apply(Layer(info_of(matrix), matrix.float(), Dense(matrix)), config)
    assert isinstance(applied, IntGrouped)
    return rtn.measured(matrix, info_of(matrix), config), applied


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("given", CONFIGS, ids=str)
def test_is_what_torch_gives(given: dict[str, Any], dtype: torch.dtype) -> None:
    config = RtnConfig(**given)
    matrix = weight(74 if given.get("group_size") == 37 else 64, dtype)
    kept = matrix.clone()
    found, applied = both(matrix, config)
    assert torch.equal(matrix, kept)
    assert found.weight.meta() == applied.meta()
    for suffix, tensor in applied.tensors().items():
        assert torch.equal(found.weight.tensors()[suffix], tensor), suffix
    assert torch.equal(found.weight.codes, applied.codes)
    assert (found.error, found.norm) == pytest.approx(squared_sums(matrix.float(), applied), rel=1e-5)


@pytest.mark.usefixtures("passes")
def test_a_tie_goes_to_the_even_code() -> None:
    """Scale 1: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2; 7.5 would be 8 and is cut to 7."""
    matrix = torch.tensor([[7.5, 0.5, 1.5, 2.5, -0.5, -1.5, -7.5, 3.0]])
    found, applied = both(matrix, RtnConfig(bits=4, group_size=8, scale_dtype="float32"))
    assert found.weight.codes.tolist() == applied.codes.tolist() == [[7, 0, 2, 2, 0, -2, -8, 3]]


@pytest.mark.usefixtures("passes")
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("value", [float("nan"), float("-nan"), float("inf"), float("-inf"), 3e25])
def test_what_has_no_sum_of_squares_is_left_to_torch(value: float) -> None:
    matrix = weight()
    matrix[9, 11] = value
    assert rtn.measured(matrix, info_of(matrix), RtnConfig(bits=4, group_size=32)) is None


@pytest.mark.usefixtures("passes")
def test_scales_that_overflow_are_left_to_torch() -> None:
    """It refuses them by name."""
    matrix = torch.full((2, 32), 3e8)
    assert rtn.measured(matrix, info_of(matrix), RtnConfig(bits=2, group_size=32, scale_dtype="float16")) is None


@pytest.mark.usefixtures("passes")
def test_a_search_for_the_range_is_left_to_torch() -> None:
    assert rtn.measured(weight(), info_of(weight()), RtnConfig(bits=4, group_size=32, range="mse")) is None


def test_without_numba_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled._loaded.cache_clear()
    try:
        assert rtn.measured(weight(), info_of(weight()), RtnConfig(bits=4, group_size=32)) is None
    finally:
        compiled._loaded.cache_clear()


def test_codes_that_are_replaced_are_packed_anew() -> None:
    """A mask on the codes must not leave the stream of the old ones."""
    codes = torch.ones(1, 32, dtype=torch.int8)
    known = IntGrouped(codes, torch.ones(1, 1), None, 4).with_stream(torch.zeros(1, 4, dtype=torch.int32))
    assert not known.packed().any()
    assert dataclasses.replace(known, codes=codes).packed().tolist() == [[0x99999999 - (1 << 32)] * 4]
