"""Every stored form: exact round trips, outlines without data, rows, and parts inside other forms."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from aicompress.weights import (
    Codebook,
    ColumnScaled,
    Corrected,
    Dense,
    IntGrouped,
    LowRank,
    Sparse,
    SparseCodes,
    Weight,
    outline_nbytes,
    restore,
)
from aicompress.weights.form import nest, unnest


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ints(bits: int, groups: tuple[int, int], symmetric: bool, shape: tuple[int, int] = (6, 12)) -> IntGrouped:
    low, generator = -(1 << (bits - 1)), torch.Generator().manual_seed(bits)
    codes = torch.randint(low, -low, shape, generator=generator).to(torch.int8)
    zero = None if symmetric else torch.randint(low, -low, groups, generator=generator).to(torch.int8)
    group_size = shape[1] // groups[1] if groups[1] > 1 else 0
    return IntGrouped(codes, torch.rand(groups, generator=generator).bfloat16(), zero, bits, group_size)


def codes(bits: int, shape: tuple[int, int] = (6, 12)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 1 << bits, shape, generator=generator).to(torch.uint8)


FORMS: dict[str, Weight] = {
    "dense": Dense(randn(6, 12).bfloat16()),
    "low rank": LowRank(Dense(randn(6, 2).half()), Dense(randn(2, 12).half())),
    "sparse": Sparse.of(randn(6, 12).bfloat16(), randn(6, 12, seed=1) > 0),
    "sparse float8": Sparse.of(randn(6, 12).to(torch.float8_e4m3fn), randn(6, 12, seed=1) > 0),
    "sparse, nothing left": Sparse.of(randn(6, 12), torch.zeros(6, 12, dtype=torch.bool)),
    "quantized factors": LowRank(ints(4, (6, 1), True, (6, 2)), ints(8, (2, 3), False, (2, 12))),
    "one table": Codebook(codes(4), randn(1, 16).half(), None, 4),
    "table per row": Codebook(codes(3), randn(6, 8).half(), None, 3),
    "table per group": Codebook(codes(1), randn(18, 2).half(), None, 1),
    "table and scales": Codebook(codes(8), randn(1, 256).half(), randn(6, 3).half(), 8),
    "column factors": ColumnScaled(ints(3, (6, 3), False), randn(12).half()),
    "real zero points": replace(ints(4, (6, 3), True), zero=randn(6, 3).half()),
    "corrected": Corrected(ints(2, (6, 3), True), LowRank(Dense(randn(6, 2).half()), Dense(randn(2, 12).half()))),
    "corrected, all quantized": Corrected(
        ColumnScaled(ints(2, (6, 3), True), randn(12)), LowRank(ints(8, (6, 1), True, (6, 2)), Dense(randn(2, 12)))
    ),
    **{
        f"sparse codes {bits} {groups} {'sym' if symmetric else 'asym'}": SparseCodes.of(
            ints(bits, groups, symmetric), randn(6, 12, seed=bits) > 0.5
        )
        for bits in (2, 3, 8)
        for groups in ((1, 1), (6, 3))
        for symmetric in (True, False)
    },
    "sparse codes, nothing left": SparseCodes.of(ints(4, (6, 1), True), torch.zeros(6, 12, dtype=torch.bool)),
    "sparse factor": LowRank(Sparse.of(randn(6, 2), randn(6, 2) > 0), Dense(randn(2, 12))),
    **{
        f"int {bits} {groups} {'sym' if symmetric else 'asym'}": ints(bits, groups, symmetric)
        for bits in range(1, 9)
        for groups in ((1, 1), (6, 1), (6, 3))
        for symmetric in (True, False)
    },
}


@pytest.mark.parametrize("weight", FORMS.values(), ids=FORMS)
class TestEveryForm:
    def test_restores_bit_exact_through_json(self, weight: Weight) -> None:
        found = restore(weight.tensors(), json.loads(json.dumps(weight.meta())))
        assert type(found) is type(weight)
        assert found.shape == weight.shape == (6, 12)
        assert torch.equal(found.dense(), weight.dense())
        assert found.meta() == weight.meta()

    def test_outline_has_no_data_and_the_same_specs(self, weight: Weight) -> None:
        outline = restore({k: t.to("meta") for k, t in weight.tensors().items()}, weight.meta())
        assert outline.specs() == weight.specs()
        assert outline.parameters() == weight.parameters()
        assert outline_nbytes(outline) == sum(t.numel() * t.element_size() for t in weight.tensors().values())
        assert all(tensor.device.type == "meta" for tensor in outline.tensors().values())

    def test_rows_are_rows_of_dense(self, weight: Weight) -> None:
        dense = weight.dense()
        for start, stop in ((0, 6), (2, 5), (5, 6), (4, 9)):
            assert torch.allclose(weight.rows(start, stop), dense[start:stop], atol=1e-6)

    def test_cannot_pass_for_the_dense_parameter(self, weight: Weight) -> None:
        assert weight.form == "dense" or weight.tensors()[""].shape != (6, 12)


def test_int_grouped_decodes_by_hand() -> None:
    """(q - z) s: (3 - 1) 0.5 = 1, (-8 - 1) 0.5 = -4.5; second group (2 + 2) 2 = 8."""
    weight = IntGrouped(
        torch.tensor([[3, -8, 2, 0]], dtype=torch.int8), torch.tensor([[0.5, 2.0]]),
        torch.tensor([[1, -2]], dtype=torch.int8), 4, 2,
    )  # fmt: skip
    assert weight.dense().tolist() == [[1.0, -4.5, 8.0, 4.0]]


def test_codebook_decodes_by_hand() -> None:
    """Row 0 looks up (1, 2), row 1 looks up (3, 4); the second group of columns counts tenfold."""
    tables, scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 10.0], [1.0, 10.0]])
    weight = Codebook(torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.uint8), tables, scale, 1)
    assert weight.dense().tolist() == [[1, 2, 20, 10], [4, 3, 30, 40]]


def test_corrected_and_column_factors_decode_by_hand() -> None:
    """Codes (1, 2) times scale 2 and columns (1, 3) give (2, 12); the correction 5 (1, 1) is added to that."""
    base = ColumnScaled(
        IntGrouped(torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[2.0]]), None, 4), torch.tensor([1.0, 3.0])
    )
    factors = LowRank(Dense(torch.tensor([[5.0]])), Dense(torch.tensor([[1.0, 1.0]])))
    assert Corrected(base, factors).dense().tolist() == [[7, 17]]


def test_sparse_keeps_every_bit() -> None:
    """Zeros, negative zeros and subnormals that the mask keeps come back as they were."""
    matrix = torch.tensor([[0.0, -0.0, 1e-40, 5.0]])
    found = Sparse.of(matrix, torch.tensor([[True, True, True, False]])).matrix()
    assert torch.equal(found.view(torch.int32), torch.tensor([[0.0, -0.0, 1e-40, 0.0]]).view(torch.int32))


def test_nesting_undoes() -> None:
    tensors = {"": randn(1), "scale": randn(1), "in_scale": randn(1)}
    assert unnest("in", nest("in", tensors)).keys() == tensors.keys()
    assert nest("", tensors) == tensors


def test_parameters_count_numbers_not_scales() -> None:
    assert FORMS["low rank"].parameters() == 6 * 2 + 2 * 12
    assert FORMS["sparse, nothing left"].parameters() == 0
    assert ints(4, (6, 3), False).parameters() == 72
