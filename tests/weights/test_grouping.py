"""N:M masks packed: exact round trips, the size of their entropy, and the decoder that travels with a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aicompress.methods.prune.masks.masks import pattern_mask
from aicompress.model.hf.decoding_aicompress import decode
from aicompress.weights import IntGrouped, Sparse, SparseCodes, outline_nbytes, restore
from aicompress.weights.grouping import Grouping, packed, table, word


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_by_hand() -> None:
    """The six ways of 2:4 in order: 0011 0101 1001 0110 1010 1100, lowest bit first; three of them in a byte."""
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0]]).bool()  # ways 0, 5, 2, then 3
    assert Grouping(2, 4).pack(mask).tolist() == [0 + 6 * 5 + 36 * 2, 3]
    assert table(2, 4).tolist() == [0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100]
    assert word(2, 4) == (1, 3)


@pytest.mark.parametrize(("kept", "size"), [(2, 4), (1, 4), (4, 8), (1, 2), (7, 16), (3, 3), (8, 16), (1, 16)])
@pytest.mark.parametrize("ordered", [False, True])
def test_round_trip(kept: int, size: int, ordered: bool) -> None:
    rows, columns = 5, 7 * size
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0)).short() if ordered else None
    scores = randn(rows, columns).abs()
    mask = pattern_mask(scores if order is None else scores[:, order.long()], kept, size)
    if order is not None:
        mask = torch.empty_like(mask).index_copy_(1, order.long(), mask)
    grouping = Grouping(kept, size, order)
    assert torch.equal(grouping.unpack(grouping.pack(mask), (rows, columns)), mask)
    assert grouping.pack(mask.to("meta")).shape == grouping.pack(mask).shape
    for weight in (
        Sparse.of(randn(rows, columns).bfloat16(), mask, grouping),
        SparseCodes.of(
            IntGrouped((randn(rows, columns) * 2).clamp(-8, 7).to(torch.int8), torch.ones(rows, 1), None, 4),
            mask,
            grouping,
        ),
    ):
        again = restore(weight.tensors(), weight.meta())
        assert torch.equal(again.dense(), weight.dense())
        assert again.specs() == weight.specs()
        assert torch.equal(decode(weight.meta(), weight.tensors()).float(), weight.dense())
        empty = restore({k: t.to("meta") for k, t in weight.tensors().items()}, weight.meta())
        assert empty.specs() == weight.specs()
    assert grouping.nbytes(rows, columns) == sum(
        t.numel() * t.element_size() for name, t in weight.tensors().items() if name in ("", "order")
    )


def test_two_of_four_takes_two_thirds_of_a_bit_mask() -> None:
    weight = randn(64, 96)
    mask = pattern_mask(weight.abs(), 2, 4)
    bit_mask = Sparse.of(weight.bfloat16(), mask)
    grouping = packed(Grouping(2, 4), 64, 96)
    assert grouping is not None
    smaller = Sparse.of(weight.bfloat16(), mask, grouping)
    survivors = 64 * 96 // 2 * 2
    assert outline_nbytes(bit_mask) - survivors == 64 * 96 // 8
    assert outline_nbytes(smaller) - survivors == 64 * 96 // 12


def test_what_a_bit_mask_holds_in_less_is_not_packed() -> None:
    assert Grouping.outline(16, 32, 64, False) is None
    assert Grouping.outline(2, 4, 66, False) is None
    assert packed(Grouping(2, 4, torch.arange(64)), 2, 64) is None  # the order takes more than it saves
    assert packed(None, 4, 4) is None


def test_another_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="not 2:4"):
        Grouping(2, 4).pack(torch.tensor([[True, True, True, False]]))
