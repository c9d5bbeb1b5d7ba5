"""How large the factors of a layer are: what a recipe says of it, in ranks and in bytes, shared by all methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch
from pydantic import ByteSize, Field
from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.factorize.budget.ranks import (
    factor_parameters,
    largest_rank,
)
from aicompress.methods.method import MethodConfig
from aicompress.weights import Dense, LowRank, Weight

LANE = 32  # bytes of a row of a factor: half a cache line
COARSEST = 16  # steps of ranks in a layer's smaller side, at least


class RankConfig(MethodConfig):
    """Parameters that say how large factors are."""

    one_of: ClassVar[tuple[str, ...]] = ("rank", "energy", "keep", "target_bytes", "max_kl")
    budgets: ClassVar[frozenset[str]] = frozenset({"keep", "target_bytes"})

    rank: int | None = Field(None, ge=1, description="columns of U; a layer that it would not shrink stays dense")
    energy: float | None = Field(
        None, gt=0, le=1, description="the smallest rank whose singular values hold this share of Σσ², per layer"
    )
    keep: float | None = Field(None, gt=0, le=1, description="share of a layer's parameters that its factors have")
    target_bytes: ByteSize | None = Field(
        None,
        gt=0,
        description="weight bytes of the output, in a level of its layers, e.g. 20MB; the most σ² per byte",
    )
    max_kl: float | None = Field(
        None, gt=0, description="fewest bytes with this divergence of the outputs in nats, tried on calibration data"
    )
    multiple: int | None = Field(
        None,
        ge=1,
        description="ranks are multiples of this, so that groups of a later quantization fit; null: of 8, in two-byte "
        "dtypes of 16, where large layers share out bytes or a divergence, which kernels run fastest; else of 1",
    )

    @property
    def by_spectrum(self) -> bool:
        """Whether singular values decide on the rank, of a layer or of several together."""
        return self.energy is not None or self.target_bytes is not None or self.tried

    @property
    def tried(self) -> bool:
        """Whether the running model decides on the rank."""
        return self.max_kl is not None

    def as_tried(self) -> Self:
        """The parameters under which layers are tried on the running model, and written: a shift must be asked for."""
        shifts = "shift" in type(self).model_fields and "shift" not in self.model_fields_set
        return self.model_copy(update={"shift": 0.0}) if self.tried and shifts else self


R = TypeVar("R", bound=RankConfig)


@dataclass(frozen=True)
class Gains:
    """What each further rank of a layer gains.

    Attributes:
        squares: σ² in descending order, (min(out, in),).
        comparable: in a unit that all layers share; otherwise they count as much as an average layer of its size.
    """

    squares: Tensor
    comparable: bool = True


def rank_of(info: LayerInfo, config: RankConfig) -> int | None:
    """The rank that the config asks for; None when it depends on the data and is not resolved yet."""
    (out, columns), multiple = info.shape, config.multiple or 1
    if config.keep is not None and config.rank is None:
        rank = int(config.keep * out * columns / (out + columns))
        return max(multiple, rank // multiple * multiple)
    return None if config.rank is None else -(-config.rank // multiple) * multiple


def step(info: LayerInfo, config: RankConfig) -> int:
    """Ranks that a layer gains at once where layers share out bytes.

    Kernels take longer for ranks between: in products of 1024 x 4096 with 512 rows on one AVX2 core the factors took
    1.33 of the time that their multiply-adds tell at rank 127 and 1.02 at 128 in float32, 1.27 and 1.15 in bfloat16.
    """
    if config.multiple is not None:
        return config.multiple
    ranks = LANE // factor_dtype(info).itemsize
    return ranks if min(info.shape) >= COARSEST * ranks else 1


def factor_dtype(info: LayerInfo) -> torch.dtype:
    """Dtype of the factors: the layer's, but never one byte wide; float8 without a scale does not hold a factor."""
    return info.dtype if info.dtype.itemsize > 1 else torch.bfloat16


def factor_nbytes(info: LayerInfo, rank: int) -> int:
    """Bytes of both factors."""
    return factor_parameters(info.shape, rank) * factor_dtype(info).itemsize


def dense_nbytes(info: LayerInfo) -> int:
    """Bytes of the whole matrix."""
    return info.shape[0] * info.shape[1] * info.dtype.itemsize


def shrinks(info: LayerInfo, rank: int) -> bool:
    """Whether factors of this rank are smaller than the dense matrix."""
    return factor_nbytes(info, rank) < dense_nbytes(info)


def check(info: LayerInfo, config: RankConfig) -> tuple[str, str] | None:
    """A factor is not factorized again, and a compressed layer must not grow."""
    if info.part or info.stored == "low_rank":
        return of_factors(info)
    rank = rank_of(info, config)
    if info.stored == "dense" or rank is None:
        return None
    size = factor_nbytes(info, rank) if shrinks(info, rank) else dense_nbytes(info)
    return None if size < info.nbytes else growing(info, size, f" at rank {rank}")


def of_factors(info: LayerInfo) -> tuple[str, str]:
    """What is said against a layer that is factorized already."""
    return (f"{info.name}: is a part of a factorized layer already", "factorize the model it was made from")


def growing(info: LayerInfo, size: int, where: str = "") -> tuple[str, str]:
    """What is said against a compressed layer whose factors would take as many bytes, or more."""
    return (
        f"{info.name}: is stored as {info.stored} in {info.nbytes} bytes;{where} it would take {size}",
        "factorize first, then compress the factors, or exclude the layer",
    )


def outline(info: LayerInfo, config: RankConfig) -> Weight:
    """The stored weight without data."""
    rank = resolved_rank(info, config)
    if not shrinks(info, rank):
        return Dense.outline(info.shape, info.dtype)
    dtype = factor_dtype(info)
    return LowRank(Dense.outline((info.shape[0], rank), dtype), Dense.outline((rank, info.shape[1]), dtype))


def stored(layer: Layer, config: RankConfig, factors: Callable[[int], tuple[Tensor, Tensor]]) -> Weight:
    """A layer's factors as they are stored, or the layer where they would not be smaller.

    Args:
        layer: the layer.
        config: gives the rank.
        factors: rank -> U (out, rank) and V (rank, in).
    """
    rank = resolved_rank(layer.info, config)
    if not shrinks(layer.info, rank):
        return kept_dense(layer)
    out, inner = factors(rank)
    dtype = factor_dtype(layer.info)
    return LowRank(Dense(out.to(dtype).contiguous()), Dense(inner.to(dtype).contiguous()))


def kept_dense(layer: Layer) -> Dense:
    """A layer as the plain matrix, of which nothing smaller is stored."""
    return layer.stored if isinstance(layer.stored, Dense) else Dense(layer.weight.to(layer.info.dtype))


def resolved_rank(info: LayerInfo, config: RankConfig) -> int:
    """The rank of a layer.

    Raises:
        RecipeError: it depends on the layer's values.
    """
    rank = rank_of(info, config)
    if rank is None:
        raise RecipeError(f"{info.name}: its rank is not decided", "energy, target_bytes and max_kl need its values")
    return rank


def alike(info: LayerInfo, given: R, found: Sequence[R]) -> R:
    """One rank for the experts in a tensor: the largest, which keeps each energy, or within a budget the average.

    A dense matrix counts as the largest rank whose factors are smaller, so that the average takes no more bytes.
    """
    ranks = [config.rank or 0 for config in found]
    if given.energy is not None:
        return found[ranks.index(max(ranks))]
    largest, multiple = largest_rank(info.shape), step(info, given)
    if min(ranks) > largest:
        return found[0]  # all are dense
    average = sum(min(rank, largest) for rank in ranks) // len(ranks)
    return found[0].model_copy(update={"rank": max(multiple, average // multiple * multiple)})


def energy_rank(squares: Tensor, energy: float) -> int:
    """Smallest r with Σ_{i<=r} σ² >= energy Σ σ²; at least 1."""
    held = squares.cumsum(0)
    return int((held < energy * held[-1]).sum().clamp_max(len(squares) - 1)) + 1


def describe(config: RankConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    if isinstance(weight, LowRank):
        return {"rank": weight.rank}
    rank = config.rank
    if rank is None:
        out, columns = weight.shape
        rank = max(config.multiple or 1, int((config.keep or 1) * out * columns / (out + columns)))
    largest = largest_rank(weight.shape)
    limit = f"only ranks up to {largest} would" if largest else "no rank would"
    return {"rank": "full", "note": f"rank {rank} would not make it smaller ({limit}): kept dense"}
