from __future__ import annotations

import pytest
import torch

from aicompress.weights import Dense, IntGrouped, LowRank, Sparse, Weight

GENERATOR = torch.Generator().manual_seed(0)
INDEX = torch.tensor([1, 2, 5])


def ints(scale: tuple[int, int], group_size: int = 0, zeros: bool = False) -> IntGrouped:
    codes = torch.randint(-8, 8, (6, 8), generator=GENERATOR, dtype=torch.int8)
    zero = torch.randint(-8, 8, scale, generator=GENERATOR, dtype=torch.int8) if zeros else None
    return IntGrouped(codes, torch.rand(scale, generator=GENERATOR) + 0.1, zero, 4, group_size)


def dense(rows: int = 6, columns: int = 8) -> Dense:
    return Dense(torch.randn(rows, columns, generator=GENERATOR))


WEIGHTS: dict[str, Weight] = {
    "dense": dense(),
    "a scale per row": ints((6, 1), zeros=True),
    "one scale": ints((1, 1)),
    "low rank": LowRank(dense(6, 1), dense(1, 8)),
    "low rank of ints": LowRank(dense(6, 1), IntGrouped(ints((1, 1)).codes[:1], torch.ones(1, 1), None, 4)),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("axis", [0, 1])
def test_keeps_form_and_values(name: str, axis: int) -> None:
    weight = WEIGHTS[name]
    part = weight.cut(axis, INDEX)
    assert part is not None
    assert part.form == weight.form
    assert torch.equal(part.dense(), weight.dense().index_select(axis, INDEX))
    whole = type(weight).restore({k: t.to("meta") for k, t in weight.tensors().items()}, weight.meta())
    outline = whole.cut(axis, INDEX)
    assert outline is not None
    assert outline.specs() == part.specs()


def test_rows_of_groups_keep_their_scales() -> None:
    weight = ints((6, 2), group_size=4, zeros=True)
    part = weight.cut(0, INDEX)
    assert part is not None
    assert torch.equal(part.dense(), weight.dense()[INDEX])


@pytest.mark.parametrize(
    ("weight", "axis"),
    [
        (ints((6, 2), group_size=4), 1),
        (LowRank(dense(6, 3), dense(3, 8)), 0),  # 3 * (3 + 8) numbers where 3 * 8 do
        (Sparse.of(torch.ones(6, 8), torch.eye(6, 8, dtype=torch.bool)), 0),
    ],
)
def test_says_when_the_form_cannot_hold_the_cut(weight: Weight, axis: int) -> None:
    assert weight.cut(axis, INDEX) is None
