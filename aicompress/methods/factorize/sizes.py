"""How large the factors of a layer are: what a recipe says of it, in ranks and in bytes, shared by all methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import ByteSize, Field
from torch import Tensor

from aicompress.errors import CompressError, RecipeError, raise_all
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate
from aicompress.methods.factorize.ranks import Spectrum, allocate, factor_parameters, largest_rank
from aicompress.methods.method import MethodConfig
from aicompress.weights import Dense, LowRank, Weight


class RankConfig(MethodConfig):
    """Parameters that say how large factors are."""

    one_of: ClassVar[tuple[str, ...]] = ("rank", "energy", "keep", "target_bytes")
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
    multiple: int = Field(
        1, ge=1, description="ranks are multiples of this, so that groups of a later quantization fit"
    )

    @property
    def by_spectrum(self) -> bool:
        """Whether singular values decide on the rank, of a layer or of several together."""
        return self.energy is not None or self.target_bytes is not None


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
    out, columns = info.shape
    if config.keep is not None and config.rank is None:
        rank = int(config.keep * out * columns / (out + columns))
        return max(config.multiple, rank // config.multiple * config.multiple)
    return None if config.rank is None else -(-config.rank // config.multiple) * config.multiple


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
        raise RecipeError(f"{info.name}: its rank is not decided", "energy and target_bytes need the layer's values")
    return rank


def resolve(candidates: Sequence[Candidate[R]], other_bytes: int, gains: Callable[[Candidate[R]], Gains]) -> list[R]:
    """Turn `energy`, `target_bytes` and a `keep` of all layers together into ranks; each layer is read once.

    Args:
        candidates: the layers.
        other_bytes: of everything else in the output.
        gains: reads a layer and says what its ranks gain.

    Raises:
        RecipeError: the budget does not hold even rank 1 everywhere, or a compressed layer would grow.
    """
    ranks: dict[int, int] = {}
    budgets: dict[int, list[int]] = {}
    pool: dict[int, int] = {}  # bytes of a share of the parameters
    read: dict[int, Gains] = {}
    for number, candidate in enumerate(candidates):
        config = candidate.config
        if not config.by_spectrum:
            other_bytes += _nbytes(candidate)
            continue
        read[number] = gains(candidate)
        if config.energy is not None:
            wanted = energy_rank(read.pop(number).squares, config.energy)
            ranks[number] = -(-wanted // config.multiple) * config.multiple
            other_bytes += _nbytes(candidate, ranks[number])
        elif config.target_bytes is not None:
            budgets.setdefault(config.target_bytes, []).append(number)
        else:
            pool[number] = _nbytes(candidate)
            other_bytes += pool[number]
    if len(budgets) > 1:
        hint = "it is the size of the whole output: give one; levels have budgets of their own"
        raise RecipeError("target_bytes is given with several values", hint)
    spectra = _in_one_unit(candidates, read)
    if pool:
        layers = [spectrum(candidates[number], spectra[number]) for number in pool]
        ranks.update(zip(pool, allocate(layers, sum(pool.values())), strict=True))
    for budget, numbers in budgets.items():
        layers = [spectrum(candidates[number], spectra[number]) for number in numbers]
        ranks.update(zip(numbers, allocate(layers, budget - other_bytes, budget), strict=True))
    return explicit(candidates, ranks)


def _in_one_unit(candidates: Sequence[Candidate[R]], read: Mapping[int, Gains]) -> dict[int, Tensor]:
    """Gains by the number of the layer; those that are not comparable are brought to the average per weight."""
    numbers = {at: candidates[at].info.shape[0] * candidates[at].info.shape[1] for at in read}
    known = [at for at, each in read.items() if each.comparable]
    average = sum(float(read[at].squares.sum()) for at in known) / max(1, sum(numbers[at] for at in known))
    spectra: dict[int, Tensor] = {}
    for at, each in read.items():
        total = float(each.squares.sum())
        factor = average * numbers[at] / total if known and not each.comparable and total > 0 else 1.0
        spectra[at] = (each.squares * factor).cpu()
    return spectra


def explicit(candidates: Sequence[Candidate[R]], ranks: dict[int, int]) -> list[R]:
    """Each layer's config, with its rank where one was found.

    Raises:
        RecipeError: a compressed layer would grow.
    """
    decided = dict.fromkeys(type(candidates[0].config).one_of) if candidates else {}
    resolved = [
        candidate.config.model_copy(update={**decided, "rank": ranks[number]}) if number in ranks else candidate.config
        for number, candidate in enumerate(candidates)
    ]
    problems = (check(candidate.info, config) for candidate, config in zip(candidates, resolved, strict=True))
    raise_all([_refusal(problem) for problem in problems if problem is not None])
    return resolved


def _refusal(problem: tuple[str, str]) -> CompressError:
    return RecipeError(*problem)


def _nbytes(candidate: Candidate[R], rank: int | None = None) -> int:
    rank = rank or resolved_rank(candidate.info, candidate.config)
    return min(factor_nbytes(candidate.info, rank), dense_nbytes(candidate.info))


def spectrum(candidate: Candidate[R], gains: Tensor) -> Spectrum:
    """What a layer gains by each rank, and what it pays."""
    info = candidate.info
    return Spectrum(gains, factor_nbytes(info, 1), dense_nbytes(info), candidate.config.multiple)


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
        rank = max(config.multiple, int((config.keep or 1) * out * columns / (out + columns)))
    largest = largest_rank(weight.shape)
    limit = f"only ranks up to {largest} would" if largest else "no rank would"
    return {"rank": "full", "note": f"rank {rank} would not make it smaller ({limit}): kept dense"}
