"""What every stored form owes, found by discovery: a form without a row among `forms.FORMS` fails here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aicompress.checkpoint import Checkpoint
from aicompress.pipeline.verify import verify
from aicompress.weights import (
    Codebook,
    ColumnScaled,
    Corrected,
    Dense,
    IntGrouped,
    LowRank,
    Sparse,
    Weight,
    fixed_width,
    forms,
    outline_nbytes,
    restore,
)
from aicompress.weights.coding.rows import row_slices
from aicompress.weights.decoding import decode
from aicompress.weights.form import nest, unnest
from tests.weights.forms import FORMS, ints, randn, write_form

ROWS = torch.tensor([0, 2, 5])
COLUMNS = torch.tensor([1, 2, 3, 7, 8, 11])


def without_data(weight: Weight) -> Weight:
    return restore({suffix: tensor.to("meta") for suffix, tensor in weight.tensors().items()}, weight.meta())


def test_every_form_has_a_row() -> None:
    assert {weight.form for weight in FORMS.values()} == set(forms())


@pytest.mark.parametrize("weight", FORMS.values(), ids=FORMS)
class TestEveryForm:
    def test_restores_bit_exact_through_json(self, weight: Weight) -> None:
        restored = restore(weight.tensors(), json.loads(json.dumps(weight.meta())))
        assert type(restored) is type(weight)
        assert restored.shape == weight.shape == (6, 12)
        assert torch.equal(restored.dense(), weight.dense())
        assert restored.meta() == weight.meta()

    def test_outline_has_no_data_and_the_same_specs(self, weight: Weight) -> None:
        outline = without_data(weight)
        assert outline.specs() == weight.specs()
        assert outline.numbers() == weight.numbers()
        assert outline.describe() == weight.describe()
        assert outline.dense().shape == weight.shape
        assert outline_nbytes(outline) == sum(t.numel() * t.element_size() for t in weight.tensors().values())
        assert all(tensor.device.type == "meta" for tensor in outline.tensors().values())

    def test_rows_are_rows_of_dense(self, weight: Weight) -> None:
        dense = weight.dense()
        for start, stop in ((0, 6), (2, 5), (5, 6), (4, 9)):
            assert torch.allclose(weight.rows(start, stop), dense[start:stop], atol=1e-6)

    @pytest.mark.parametrize(("axis", "index"), [(0, ROWS), (1, COLUMNS)])
    def test_a_cut_is_the_cut_of_dense(self, weight: Weight, axis: int, index: torch.Tensor) -> None:
        part = weight.cut(axis, index)
        outline = without_data(weight).cut(axis, index.to("meta"))
        assert (part is None) == (outline is None)
        if part is not None and outline is not None:
            assert type(part) is type(weight)
            assert outline.specs() == part.specs()
            # A product is summed in another order where it has another shape.
            tolerance = 1e-5 if weight.parts() else 0
            torch.testing.assert_close(
                part.dense(), weight.dense().index_select(axis, index), rtol=tolerance, atol=tolerance
            )

    def test_rows_are_read_alone(self, weight: Weight, tmp_path: Path) -> None:
        """As many as lie together at a time, in any order."""
        write_form(tmp_path / "in.safetensors", weight, weight.tensors())
        checkpoint = Checkpoint.open(tmp_path / "in.safetensors")
        multiple = checkpoint.row_multiple("fc.weight")
        parts = row_slices(6, 1, 1, multiple)
        for rows in (*reversed(parts), *parts):
            part = checkpoint.weight("fc.weight", rows)
            assert type(part) is type(fixed_width(weight))
            torch.testing.assert_close(part.dense(), weight.rows(rows.start, rows.stop), rtol=0, atol=0)

    def test_is_made_of_its_parts(self, weight: Weight) -> None:
        parts = weight.parts()
        assert not parts or weight.numbers() == sum(part.numbers() for part in parts.values())
        if parts:
            assert torch.equal(weight.with_parts(parts).dense(), weight.dense())
            places = sum(tensor.nbytes for suffix, tensor in weight.tensors().items() if suffix in ("rows", "columns"))
            assert outline_nbytes(weight) == sum(outline_nbytes(part) for part in parts.values()) + places

    def test_counts_no_more_numbers_than_it_stores(self, weight: Weight) -> None:
        """A number takes a bit or more: of a code its width, of a value its dtype's."""
        assert 0 <= weight.numbers() <= 8 * outline_nbytes(weight)

    def test_describes_itself_in_a_line(self, weight: Weight) -> None:
        assert weight.describe() == weight.describe().strip()
        assert "\n" not in weight.describe()

    def test_its_decoder_gives_the_same_matrix(self, weight: Weight) -> None:
        tensors = {s: t.float() if t.is_floating_point() else t for s, t in weight.tensors().items()}
        decoded = decode(json.loads(json.dumps(weight.meta())), tensors)
        torch.testing.assert_close(decoded, weight.dense(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
    def test_whatever_new_tensors_are_by_default(self, weight: Weight, default: torch.dtype) -> None:
        """Programs set another default dtype; the numbers that a form holds are the same."""
        tensors = {s: t.float() if t.is_floating_point() else t for s, t in weight.tensors().items()}
        usual, dense = decode(weight.meta(), tensors), weight.dense()
        torch.set_default_dtype(default)
        try:
            again, restored = decode(weight.meta(), tensors), restore(weight.tensors(), weight.meta()).dense()
        finally:
            torch.set_default_dtype(torch.float32)
        assert again.dtype == usual.dtype
        assert restored.dtype == dense.dtype
        torch.testing.assert_close(again, usual, rtol=0, atol=0)
        torch.testing.assert_close(restored, dense, rtol=0, atol=0)

    def test_tensors_that_are_lost_or_short_are_refused(self, weight: Weight, tmp_path: Path) -> None:
        whole = weight.tensors()
        write_form(tmp_path / "whole.safetensors", weight, whole)
        assert verify(tmp_path / "whole.safetensors").sound
        for suffix, tensor in whole.items():
            lacking = {other: value for other, value in whole.items() if other != suffix}
            # One row is not short: a scale or a table may be for all rows.
            lengths = {0, len(tensor) // 2, len(tensor) - 1} - {1} if len(tensor) else set()
            for length in (None, *lengths):
                path = tmp_path / f"{suffix}-{length}.safetensors"
                write_form(path, weight, lacking if length is None else {**lacking, suffix: tensor[:length]})
                assert verify(path).problems, (suffix, length)

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
    restored = Sparse.of(matrix, torch.tensor([[True, True, True, False]])).matrix()
    assert torch.equal(restored.view(torch.int32), torch.tensor([[0.0, -0.0, 1e-40, 0.0]]).view(torch.int32))


def test_nesting_undoes() -> None:
    tensors = {"": randn(1), "scale": randn(1), "in_scale": randn(1)}
    assert unnest("in", nest("in", tensors)).keys() == tensors.keys()
    assert nest("", tensors) == tensors


@pytest.mark.parametrize(
    ("name", "numbers", "words"),
    [
        ("dense", 72, ""),
        ("low rank", 6 * 2 + 2 * 12, "rank 2"),
        ("quantized factors", 6 * 2 + 2 * 12, "rank 2 (4-bit × 8-bit, groups of 4, asymmetric)"),
        ("sparse", 36, "50% zeros"),
        ("sparse 2:4", 36, "50% zeros, 2:4"),
        ("sparse, nothing left", 0, "100% zeros"),
        ("one table", 72, "4-bit"),
        ("table and scales", 72, "8-bit"),
        ("column factors", 72, "3-bit, groups of 4, asymmetric, column factors"),
        ("corrected", 72 + 36, "2-bit, groups of 4, corrected at rank 2"),
        ("sparse codes 2:4", 36, "4-bit, groups of 4, asymmetric, 50% zeros, 2:4"),
        ("sparse codes, nothing left", 0, "4-bit, 100% zeros"),
        ("int 8 (6, 1) asym", 72, "8-bit, asymmetric"),
    ],
)
def test_numbers_and_words(name: str, numbers: int, words: str) -> None:
    """Codes, kept values and what factors store are numbers; scales, tables, column factors and masks are not."""
    assert FORMS[name].numbers() == numbers
    assert FORMS[name].describe() == words


def test_rounded_inputs_are_part_of_the_description() -> None:
    assert replace(ints(8, (6, 1), True), activation_bits=8).describe() == "8-bit, 8-bit activations"


def test_numbers_of_factors_are_those_of_their_forms() -> None:
    factor = FORMS["sparse factor"]
    assert isinstance(factor, LowRank)
    assert factor.numbers() == factor.out.numbers() + 2 * 12


@pytest.mark.parametrize("count", [0, 1 << 40])
def test_a_number_of_experts_that_cannot_be_is_refused(count: int) -> None:
    weight = FORMS["an integer weight per expert"]
    with pytest.raises(ValueError, match="experts"):
        restore(weight.tensors(), {**weight.meta(), "count": count})
