"""Truncated singular value decomposition: W ≈ (U √Σ)(√Σ Vᵀ), the closest matrix of its rank; data-free.

Eckart and Young 1936: ‖W − W_r‖²_F = Σ_{i>r} σ_i², the least of all matrices of rank r. How they are found is said in
`decomposition`; a large matrix is read in blocks of rows, several times, and never held (`streamed`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from pydantic import ConfigDict
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.measure import squared_sums
from aicompress.methods.capabilities import Candidate, Rounded, RowWise
from aicompress.methods.decisions import Allocates, Surveys, SurveySetting
from aicompress.methods.factorize import streamed
from aicompress.methods.factorize.budget import allocation, sizes
from aicompress.methods.factorize.budget.rounding import rounded
from aicompress.methods.factorize.budget.sizes import (
    Gains,
    R,
    RankConfig,
    alike,
    check,
    describe,
    factor_dtype,
    kept_dense,
    resolved_rank,
    shrinks,
    stored,
)
from aicompress.methods.factorize.decomposition import factors
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.weights import Dense, LowRank, Weight


class SvdConfig(RankConfig):
    """Parameters of svd."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"keep": 0.5}, {"rank": 4}, {"energy": 0.9}, {"rank": 3, "multiple": 2}]}
    )

    name: Literal["svd"] = "svd"


class SvdBlockConfig(SvdConfig):
    """Parameters for some rows of a layer, with what all of them gave; without an inner factor they stay dense.

    Attributes:
        inner: the layer's inner factor, (rank, in).
        right: what these rows are multiplied by for those of the outer factor, (in, rank); None where `out` is these.
        out: (rows, rank).
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    inner: Tensor | None = None
    right: Tensor | None = None
    out: Tensor | None = None


def apply(layer: Layer, config: SvdConfig) -> Weight:
    """Factorize one layer, or keep it dense where the factors would not be smaller."""
    if isinstance(config, SvdBlockConfig):
        return of_rows(layer, config)
    return stored(layer, config, partial(factors, layer.weight, seed=layer.seed))


def of_rows(layer: Layer, config: SvdBlockConfig) -> Weight:
    """Factors of some rows of a layer, or these as they are."""
    if config.inner is None:
        return kept_dense(layer)
    out = config.out if config.right is None else layer.weight @ config.right
    assert out is not None
    return LowRank(Dense(out.to(config.inner.dtype).contiguous()), Dense(config.inner))


def divided(info: LayerInfo, blocks: Sequence[Callable[[], Layer]], config: SvdConfig) -> list[SvdConfig]:
    """A config for each block of rows, with the inner factor and what gives the rows of the outer one."""
    return [*of_blocks(info, blocks, config)]


def of_blocks(info: LayerInfo, blocks: Sequence[Callable[[], Layer]], config: RankConfig) -> list[SvdBlockConfig]:
    """The same for any method whose matrix has these blocks; how often they are read is said in `streamed`."""
    rank = resolved_rank(info, config)
    if not shrinks(info, rank):
        return [SvdBlockConfig.model_construct(**dict(config))] * len(blocks)
    found = streamed.factors(_rows(info, blocks), rank, blocks[0]().seed)
    inner = found.inner.to(factor_dtype(info)).contiguous()
    if found.right is not None:
        return [SvdBlockConfig.model_construct(**dict(config), inner=inner, right=found.right)] * len(blocks)
    return [SvdBlockConfig.model_construct(**dict(config), inner=inner, out=out) for out in found.out]


def _rows(info: LayerInfo, blocks: Sequence[Callable[[], Layer]]) -> streamed.Rows:
    return streamed.Rows(info.shape, [partial(_weight, read) for read in blocks])


def _weight(read: Callable[[], Layer]) -> Tensor:
    return read().weight


def outline(info: LayerInfo, config: SvdConfig) -> Weight:
    """The stored weight without data, or that of a block of rows."""
    if not isinstance(config, SvdBlockConfig):
        return sizes.outline(info, config)
    if config.inner is None:
        return Dense.outline(info.shape, info.dtype)
    rank, columns = config.inner.shape
    dtype = config.inner.dtype
    return LowRank(Dense.outline((info.shape[0], rank), dtype), Dense.outline((rank, columns), dtype))


def gains(candidate: Candidate[R]) -> Gains:
    """σ² of a layer, which is read."""
    return Gains(streamed.squared_singular_values(_rows(candidate.info, candidate.parts)))


def resolve(candidates: Sequence[Candidate[SvdConfig]], other_bytes: int) -> list[SvdConfig]:
    """Turn `energy` and `target_bytes` into a rank for every layer, which is read; `max_kl` is left to a survey.

    Raises:
        RecipeError: the budget does not hold even rank 1 everywhere, or a compressed layer would grow.
    """
    estimates = allocation.resolve(candidates, other_bytes, gains)
    return allocation.still_open(candidates, estimates, lambda config: config.tried)


def decide(candidates: Sequence[Candidate[SvdConfig]], setting: SurveySetting) -> list[SvdConfig]:
    """Turn `max_kl` into ranks that are tried on the running model; errors as of `resolve`."""
    return allocation.resolve(candidates, setting.other_bytes, gains, setting.divergence)


def alternative(layer: Layer, config: MethodConfig, weight: Weight, nbytes: int) -> Rounded | None:
    """What rounding a layer in no more bytes would lose."""
    return rounded(layer, weight, nbytes, lambda other: squared_sums(layer.weight, other))


METHOD = LayerMethod(
    name="svd",
    command="factorize",
    summary="truncated singular value decomposition, by rank, energy, share, bytes or divergence; data-free",
    when="layers whose singular values fall off, before a distillation; quantization mostly saves more for less",
    config=SvdConfig,
    apply=apply,
    outline=outline,
    row_wise=RowWise(lambda config: True, divided=divided, exact=False),
    check=check,
    allocates=Allocates(resolve, alike),
    surveys=Surveys(lambda config: frozenset(), decide, lambda config: config.tried),
    describe=describe,
    rounded=alternative,
)
