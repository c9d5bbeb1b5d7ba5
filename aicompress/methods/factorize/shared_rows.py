"""The right factor of layers one below the other, which are read in blocks of rows and never held; data-free.

Each layer's rows are divided by its size, where layers count alike (`shared_factor`). With W_i = s_i A_i the closest
factors of [A_1; A_2; ...] are U_i / s_i and V, and what A_i is multiplied by for its rows of the outer factor gives
those of U_i from W_i. What is held beside a block is said in `streamed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.factorize import streamed
from aicompress.methods.factorize.budget.shared import numbers_of
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


def _norm(blocks: Blocks) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(read().weight, dtype=torch.float64)) for read in blocks))


def _stacked(infos: Sequence[LayerInfo], layers: Sequence[Blocks], sizes: Sequence[float]) -> Rows:
    """The layers one below the other, (Σ out, in)."""
    pairs = zip(layers, sizes, strict=True)
    return Rows(numbers_of(infos), [partial(_divided, read, size) for blocks, size in pairs for read in blocks])


def _divided(read: Callable[[], Layer], size: float) -> Tensor:
    weight = read().weight
    return weight if size == 1 else weight / size
