"""Compressed rows: the same product, and taken only where it was measured to be faster."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aicompress.model.kernels import sparse as module
from aicompress.model.kernels.linear import PlainLinear
from aicompress.model.kernels.select import fast_linear
from aicompress.model.kernels.sparse import CsrLinear, sparse_linear
from aicompress.weights import LowRank, Sparse
from tests.model.compressed import integers


def sparse(share: float, out: int = 48, columns: int = 64, dtype: torch.dtype = torch.float32) -> Sparse:
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(out, columns, generator=draw).to(dtype)
    return Sparse.of(matrix, torch.rand(out, columns, generator=draw) >= share)


@pytest.fixture(autouse=True)
def forgotten() -> None:
    module._measured.clear()


def always(monkeypatch: pytest.MonkeyPatch, found: float) -> list[int]:
    asked: list[int] = []

    def ratio(*args: object) -> float:
        asked.append(1)
        return found

    monkeypatch.setattr(module, "ratio", ratio)
    return asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_it_multiplies(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, 0.1)
    weight, bias = sparse(0.95, dtype=dtype), torch.randn(48).to(dtype)
    layer = fast_linear(weight, bias, dtype, resident=False)
    assert isinstance(layer, CsrLinear)
    assert layer.kernel == "csr"
    inputs = torch.randn(2, rows, 64).to(dtype)
    expected = torch.nn.functional.linear(inputs.float(), weight.dense(), bias.float())
    assert layer(inputs).dtype is dtype
    torch.testing.assert_close(
        layer(inputs).float(), expected, rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-5
    )


def test_a_row_without_survivors_gives_the_bias() -> None:
    weight = Sparse.of(torch.ones(3, 8), torch.tensor([[True] * 8, [False] * 8, [False] * 8]))
    layer = CsrLinear(weight.dense(), torch.tensor([1.0, 2.0, 3.0]))
    assert layer(torch.ones(1, 8)).tolist() == [[9.0, 2.0, 3.0]]


def test_it_is_taken_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = always(monkeypatch, 0.95)
    assert type(sparse_linear(sparse(0.97), None, torch.float32)) is PlainLinear
    assert len(asked) == 1
    always(monkeypatch, 0.5)
    assert type(sparse_linear(sparse(0.97), None, torch.float32)) is PlainLinear  # measured once
    assert type(sparse_linear(sparse(0.97, out=40), None, torch.float32)) is CsrLinear


def test_below_nine_tenths_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = always(monkeypatch, 0.1)
    assert type(sparse_linear(sparse(0.7), None, torch.float32)) is PlainLinear
    assert not asked


def test_times_are_really_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer against one that does its work fifty times over."""

    class Slow(PlainLinear):
        def multiply(self, x: Tensor) -> Tensor:
            for _ in range(50):
                found = super().multiply(x)
            return found

    matrix = torch.randn(128, 128)
    assert module.ratio(PlainLinear(matrix, None), Slow(matrix, None), torch.float32) < 0.5


def test_factors_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, 0.1)
    layer = fast_linear(LowRank(sparse(0.95, 48, 32), integers(torch.randn(32, 64), 8)), None, torch.float32, False)
    assert "csr" in layer.kernel
