"""Weights of every stored form, (6, 12): the rows of the tests that hold for all forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from aicompress.checkpoint.manifest import Entry, Manifest
from aicompress.weights import (
    BaseDelta,
    Codebook,
    ColumnScaled,
    Convolutions,
    Corrected,
    Dense,
    EntropyCoded,
    Float8,
    IntGrouped,
    LowRank,
    PerExpert,
    Sparse,
    SparseCodes,
    Submatrix,
    TensorSpec,
    Tied,
    Trellis,
    Weight,
)
from aicompress.weights.grouping import Grouping


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


def write_form(
    path: Path, weight: Weight, tensors: dict[str, torch.Tensor], modules: tuple[str, ...] = ("fc",)
) -> None:
    """A checkpoint of parameters that are alike, with the description of a weight and these tensors of it by suffix."""
    entry = Entry(TensorSpec(torch.float32, weight.shape), False, weight.meta(), tuple(weight.tensors()))
    manifest = Manifest({f"{module}.weight": entry for module in modules}).to_text()
    named = {
        f"{module}.weight_{suffix}" if suffix else f"{module}.weight": tensor.clone(
            memory_format=torch.contiguous_format
        )
        for module in modules
        for suffix, tensor in tensors.items()
    }
    save_file(named, path, metadata={"aicompress": manifest})


TWO_OF_FOUR = torch.tensor([[True, False, True, False] * 3]).repeat(6, 1)
ORDER = torch.randperm(12, generator=torch.Generator().manual_seed(0))

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
    "float8, one scale": Float8(randn(6, 12).to(torch.float8_e4m3fn), randn(1, 1).half(), (0, 0)),
    "float8, rows": Float8(randn(6, 12).to(torch.float8_e5m2), randn(6, 1), (1, 0)),
    "float8, blocks": Float8(randn(6, 12).to(torch.float8_e4m3fn), randn(2, 3).bfloat16(), (4, 5)),
    "float8, groups": Float8(randn(6, 12).to(torch.float8_e4m3fn), randn(6, 3), (1, 4)),
    "entropy-coded": EntropyCoded.of(ints(3, (6, 3), False)),
    "entropy-coded mask": EntropyCoded.of(Sparse.of(randn(6, 12), torch.zeros(6, 12, dtype=torch.bool))),
    "entropy-coded factor": LowRank(EntropyCoded.of(ints(3, (6, 1), True, (6, 4))), Dense(randn(4, 12).half())),
    "trellis": Trellis(codes(2).to(torch.int8) - 2, randn(6, 1).half()),
    "column factors": ColumnScaled(ints(3, (6, 3), False), randn(12).half()),
    "real zero points": replace(ints(4, (6, 3), True), zero=randn(6, 3).half()),
    "some rows": Submatrix(Dense(randn(2, 12).half()), (6, 12), torch.tensor([1, 4], dtype=torch.int32)),
    "some rows and columns": Submatrix(
        ints(4, (4, 1), True, (4, 3)),
        (6, 12),
        torch.tensor([0, 2, 3, 5], dtype=torch.int32),
        torch.tensor([0, 6, 11], dtype=torch.int32),
    ),
    "two convolutions": Convolutions(((2, 1), (1, 3)), Dense(randn(3, 4).half()), Dense(randn(6, 9).half())),
    "three convolutions": Convolutions(
        ((1, 1), (2, 3), (1, 1)), Dense(randn(2, 2)), ints(8, (6, 1), True, (6, 4)), ints(4, (4, 3), False, (4, 12))
    ),
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
    "base and difference": BaseDelta(Dense(randn(6, 2).half()), Dense(randn(2, 12).half()), Dense(randn(6, 12))),
    "base and difference, quantized": BaseDelta(
        ints(4, (6, 1), True, (6, 2)), Dense(randn(2, 12)), ints(4, (6, 3), True)
    ),
    "an integer weight per expert": PerExpert(
        tuple(replace(ints(3, (2, 3), False, (2, 12)), scale=randn(2, 3, seed=n).half()) for n in (1, 2, 3))
    ),
    "two factors per expert, transposed": PerExpert(
        tuple(LowRank(Dense(randn(12, 1, seed=n).half()), Dense(randn(1, 3, seed=n).half())) for n in (1, 2)), True
    ),
    "a mask per expert": PerExpert(
        tuple(Sparse.of(randn(3, 12, seed=n), TWO_OF_FOUR[:3], Grouping(2, 4)) for n in (1, 2))
    ),
    "tied": Tied(Dense(randn(6, 12).half())),
    "tied, transposed": Tied.of(Dense(randn(12, 6).half().t()), (12, 6), transposed=True),
    "tied to a convolution": Tied.of(Dense(randn(6, 12)), (6, 3, 4), transposed=False),
    "tied to codes": Tied(ints(4, (6, 3), False)),
    "sparse codes, nothing left": SparseCodes.of(ints(4, (6, 1), True), torch.zeros(6, 12, dtype=torch.bool)),
    "sparse 2:4": Sparse.of(randn(6, 12), TWO_OF_FOUR, Grouping(2, 4)),
    "sparse 2:4 of ordered columns": Sparse.of(
        randn(6, 12), TWO_OF_FOUR[:, ORDER.argsort()], Grouping(2, 4, ORDER.short())
    ),
    "sparse codes 2:4": SparseCodes.of(ints(4, (6, 3), False), TWO_OF_FOUR, Grouping(2, 4)),
    "sparse factor": LowRank(Sparse.of(randn(6, 2), randn(6, 2) > 0), Dense(randn(2, 12))),
    **{
        f"int {bits} {groups} {'sym' if symmetric else 'asym'}": ints(bits, groups, symmetric)
        for bits in range(1, 9)
        for groups in ((1, 1), (6, 1), (6, 3))
        for symmetric in (True, False)
    },
}
