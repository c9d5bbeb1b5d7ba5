"""The right factor of layers one below the other, which are read in blocks of rows and never held; data-free.

Each layer's rows are divided by its size, where layers count alike (`shared_factor`). With W_i = s_i A_i the closest
factors of [A_1; A_2; ...] are U_i / s_i and V, and what A_i is multiplied by for its rows of the outer factor gives
those of U_i from W_i. What is held beside a block is said in `streamed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.factorize import streamed, svd
from aicompress.methods.factorize.budget.shared import SharedRankConfig, numbers_of, rank_of, shrinks
from aicompress.methods.factorize.budget.sizes import factor_dtype
from aicompress.methods.factorize.streamed import Factors, Rows
from aicompress.methods.factorize.weighting.roots import balance

Blocks: TypeAlias = Sequence[Callable[[], Layer]]  # functions that read a layer's blocks of rows, first rows first


def sizes_of(layers: Sequence[Blocks], relative: bool) -> list[float]:
    """What each layer's rows are divided by: ‖W_i‖, or 1."""
    return [_norm(blocks) or 1.0 if relative else 1.0 for blocks in layers]


def squared_singular_values(infos: Sequence[LayerInfo], layers: Sequence[Blocks], relative: bool) -> Tensor:
    """σ² of the layers one below the other, in descending order, (min(Σ out, in),) float64."""
    return streamed.squared_singular_values(_stacked(infos, layers, sizes_of(layers, relative)))


def factors(infos: Sequence[LayerInfo], layers: Sequence[Blocks], rank: int, relative: bool) -> Factors:
    """V, and what gives the rows of all U_i, of which columns are as long as rows of V.

    Args:
        infos: the layers.
        layers: their blocks.
        rank: of V.
        relative: each layer counts in parts of its size.
    """
    sizes = sizes_of(layers, relative)
    found = streamed.factors(_stacked(infos, layers, sizes), rank, layers[0][0]().seed)
    scales = [size for blocks, size in zip(layers, sizes, strict=True) for _ in blocks]
    for block, size in zip(found.out, scales if found.out else [], strict=True):
        block *= size
    squares = torch.zeros(rank, dtype=torch.float64)
    for block in found.out if found.right is None else (read().weight @ found.right for its in layers for read in its):
        squares += torch.linalg.vector_norm(block, dim=0, dtype=torch.float64).square()
    ratio, back = balance(squares.sqrt(), torch.linalg.vector_norm(found.inner, dim=1, dtype=torch.float64))
    for outer in found.out if found.right is None else [found.right]:
        outer *= ratio
    found.inner.mul_(back[:, None])
    return found


class SharedBlockConfig(SharedRankConfig):
    """Parameters for a block of rows of each layer, those left out that have none of this number.

    Attributes:
        rows: what gives their factors.
    """

    rows: list[svd.SvdBlockConfig]


def divided(infos: Sequence[LayerInfo], blocks: Sequence[Blocks], config: SharedRankConfig) -> list[Any]:
    """A config for the blocks of each number, first rows first, with the factor that all of them share."""
    rank = rank_of(infos, config)
    given: list[list[svd.SvdBlockConfig]]
    if shrinks(infos, rank):
        found = factors(infos, blocks, rank, config.relative)
        inner, out = found.inner.to(factor_dtype(infos[0])).contiguous(), iter(found.out)
        make = partial(svd.SvdBlockConfig.model_construct, inner=inner, right=found.right)
        given = [[make(out=next(out, None)) for _ in its] for its in blocks]
    else:
        given = [[svd.SvdBlockConfig.model_construct() for _ in its] for its in blocks]
    together = zip_longest(*given)
    return [SharedBlockConfig.model_construct(**dict(config), rows=[*filter(None, rows)]) for rows in together]


def _norm(blocks: Blocks) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(read().weight, dtype=torch.float64)) for read in blocks))


def _stacked(infos: Sequence[LayerInfo], layers: Sequence[Blocks], sizes: Sequence[float]) -> Rows:
    """The layers one below the other, (Σ out, in)."""
    pairs = zip(layers, sizes, strict=True)
    return Rows(numbers_of(infos), [partial(_divided, read, size) for blocks, size in pairs for read in blocks])


def _divided(read: Callable[[], Layer], size: float) -> Tensor:
    weight = read().weight
    return weight if size == 1 else weight / size
