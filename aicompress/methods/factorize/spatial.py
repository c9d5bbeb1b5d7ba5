"""A k×k convolution as a k×1 and a 1×k one: the factors of least error that go along one axis each; data-free.

Jaderberg, Vedaldi and Zisserman 2014, "Speeding up convolutional neural networks with low rank expansions",
arXiv:1405.3866, section 2.2 (scheme 2): W[o, i, y, x] ≈ Σ_r H[o, r, x] V[r, i, y]. With the columns (i, y) and the rows
(o, x) of a matrix this is a product of two factors, of which svd gives the best (Tai et al. 2016, arXiv:1511.06067,
theorem 1): the error is Σ_{r>rank} σ_r² of that matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import ConfigDict
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate, RowWise
from aicompress.methods.decisions import Allocates, Surveys, SurveySetting
from aicompress.methods.factorize import decomposition, svd
from aicompress.methods.factorize.budget import allocation, sizes
from aicompress.methods.factorize.budget.sizes import RankConfig
from aicompress.methods.layerwise import LayerMethod
from aicompress.weights import Convolutions, Dense, LowRank, Weight


class SpatialConfig(RankConfig):
    """Parameters of spatial; the rank is the number of channels between the two convolutions."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"keep": 0.5}, {"rank": 4}, {"energy": 0.9}, {"target_bytes": "1MB"}]}
    )

    name: Literal["spatial"] = "spatial"


def suits(info: LayerInfo) -> bool:
    """Whether a layer is a two-dimensional convolution of several positions; one of a single channel is no matrix.

    Nor is a depthwise convolution, whose kernel has a single channel, too.
    """
    if info.part:
        return True  # which `check` refuses
    shape = info.tensor_shape
    return info.kind == "conv" and len(shape) == 4 and shape[1] > 1 and shape[2] * shape[3] > 1


def rearranged(info: LayerInfo) -> LayerInfo:
    """The layer as the matrix (O*kw, I*kh) that is factorized."""
    out, channels, high, wide = info.tensor_shape
    return replace(info, shape=(out * wide, channels * high))


class SpatialBlockConfig(SpatialConfig):
    """Parameters for some rows of a layer: those of svd for the same rows of the matrix."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    rows: svd.SvdBlockConfig


def turned(read: Callable[[], Layer]) -> Layer:
    """A layer, or some of its outputs, as rows of that matrix."""
    layer = read()
    out, channels, high, wide = layer.info.tensor_shape
    axes = layer.weight.reshape(out, channels, high, wide).permute(0, 3, 1, 2)
    values = axes.reshape(out * wide, channels * high)
    return replace(layer, info=rearranged(layer.info), weight=values, stored=Dense(values))


def apply(layer: Layer, config: SpatialConfig) -> Weight:
    """Factorize one layer, or keep it dense where the factors would not be smaller."""
    if not suits(layer.info):
        return sizes.kept_dense(layer)
    matrix = turned(lambda: layer)
    if isinstance(config, SpatialBlockConfig):
        found = svd.of_rows(matrix, config.rows)
    else:
        found = sizes.stored(matrix, config, partial(decomposition.factors, matrix.weight, seed=layer.seed))
    return _convolutions(layer.info, found) if isinstance(found, LowRank) else sizes.kept_dense(layer)


def divided(info: LayerInfo, blocks: Sequence[Callable[[], Layer]], config: SpatialConfig) -> list[SpatialConfig]:
    """A config for each block of rows, with what all rows of the matrix gave."""
    if not suits(info):
        return [config] * len(blocks)
    configs = svd.of_blocks(rearranged(info), [partial(turned, read) for read in blocks], config)
    return [SpatialBlockConfig.model_construct(**dict(config), rows=rows) for rows in configs]


def outline(info: LayerInfo, config: SpatialConfig) -> Weight:
    """The stored weight without data."""
    if not suits(info):
        return Dense.outline(info.shape, info.dtype)
    rows = config.rows if isinstance(config, SpatialBlockConfig) else None
    found = sizes.outline(rearranged(info), config) if rows is None else svd.outline(rearranged(info), rows)
    return _convolutions(info, found) if isinstance(found, LowRank) else Dense.outline(info.shape, info.dtype)


def _convolutions(info: LayerInfo, found: LowRank) -> Convolutions:
    """H (O*kw, rank) and V (rank, I*kh) as the kernels of two convolutions."""
    out, _, high, wide = info.tensor_shape
    rows: Tensor = found.out.matrix  # type: ignore[attr-defined]
    last = rows.reshape(out, wide, found.rank).transpose(1, 2).reshape(out, found.rank * wide).contiguous()
    return Convolutions(((high, 1), (1, wide)), found.inner, Dense(last))


def check(info: LayerInfo, config: SpatialConfig) -> tuple[str, str] | None:
    """As of every factorization, by the bytes of the two convolutions."""
    return sizes.check(rearranged(info) if suits(info) and not info.part else info, config)


def resolve(candidates: Sequence[Candidate[SpatialConfig]], other_bytes: int) -> list[SpatialConfig]:
    """Turn `energy` and `target_bytes` into a rank for every layer, which is read once; `max_kl` is left to a survey.

    Raises:
        RecipeError: the budget does not hold even rank 1 everywhere, or a compressed layer would grow.
    """
    return allocation.still_open(candidates, _decided(candidates, other_bytes), lambda config: config.tried)


def decide(candidates: Sequence[Candidate[SpatialConfig]], setting: SurveySetting) -> list[SpatialConfig]:
    """Turn `max_kl` into ranks that are tried on the running model; errors as of `resolve`."""
    return _decided(candidates, setting.other_bytes, setting.divergence)


def _decided(
    candidates: Sequence[Candidate[SpatialConfig]],
    other_bytes: int,
    divergence: Callable[[Sequence[SpatialConfig]], float] | None = None,
) -> list[SpatialConfig]:
    suited = [number for number, candidate in enumerate(candidates) if suits(candidate.info)]
    matrices = [_matrix(candidates[number]) for number in suited]

    def whole(decided: Sequence[SpatialConfig]) -> list[SpatialConfig]:
        by_number = dict(zip(suited, decided, strict=True))
        return [by_number.get(number, candidate.config) for number, candidate in enumerate(candidates)]

    measure = None if divergence is None else lambda tried: divergence(whole(tried))
    return whole(allocation.resolve(matrices, other_bytes, svd.gains, measure))


def _matrix(candidate: Candidate[SpatialConfig]) -> Candidate[SpatialConfig]:
    """A candidate as the matrix that is factorized."""
    blocks = None if candidate.blocks is None else [partial(turned, read) for read in candidate.blocks]
    return replace(candidate, info=rearranged(candidate.info), read=partial(turned, candidate.read), blocks=blocks)


def describe(config: SpatialConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    if isinstance(weight, Convolutions):
        return {"rank": weight.channels[0]}
    return {"rank": "full", "note": "two convolutions would not be smaller: kept dense"}


METHOD = LayerMethod(
    name="spatial",
    command="factorize",
    summary="a k×k convolution as a k×1 and a 1×k one, by rank, energy, share of parameters or bytes; data-free",
    when="kernels of 3×3 and wider ones, before a distillation; `whitened` where there is data",
    config=SpatialConfig,
    apply=apply,
    outline=outline,
    row_wise=RowWise(lambda config: True, divided=divided, exact=False),
    check=check,
    allocates=Allocates(resolve),
    surveys=Surveys(lambda config: frozenset(), decide, lambda config: config.tried),
    describe=describe,
    rounded=svd.alternative,
    suits=suits,
    made_for="two-dimensional convolutions of several channels and positions",
)
