"""Truncated singular value decomposition: W ≈ (U √Σ)(√Σ Vᵀ), the closest matrix of its rank; data-free.

Eckart and Young 1936: ‖W − W_r‖²_F = Σ_{i>r} σ_i², the least of all matrices of rank r. The decomposition is the
eigendecomposition of the smaller Gram matrix in float64: exact for every σ_i above 1e-7 σ_1, and 2 to 3.5 times as fast
as the LAPACK SVD (1024 x 4096 and 384 x 1536 on two cores), so no randomized approximation is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import ByteSize, ConfigDict, Field
from torch import Tensor

from aicompress.errors import CompressError, RecipeError, raise_all
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Allocates, Candidate
from aicompress.methods.factorize.ranks import Spectrum, allocate, factor_parameters, largest_rank
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.weights import Dense, LowRank, Weight

CUTOFF = 1e-7  # of the largest singular value: what a float64 Gram matrix resolves
ROWS = 8192  # rows converted to float64 at a time


class SvdConfig(MethodConfig):
    """Parameters of svd."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"keep": 0.5}, {"rank": 4}, {"energy": 0.9}, {"rank": 3, "multiple": 2}]}
    )
    one_of: ClassVar[tuple[str, ...]] = ("rank", "energy", "keep", "target_bytes")

    name: Literal["svd"] = "svd"
    rank: int | None = Field(None, ge=1, description="columns of U; a layer that it would not shrink stays dense")
    energy: float | None = Field(
        None, gt=0, le=1, description="the smallest rank whose singular values hold this share of Σσ², per layer"
    )
    keep: float | None = Field(None, gt=0, le=1, description="share of a layer's parameters that its factors have")
    target_bytes: ByteSize | None = Field(
        None, gt=0, description="weight bytes of the whole output, e.g. 20MB; ranks are shared out by σ² per byte"
    )
    multiple: int = Field(
        1, ge=1, description="ranks are multiples of this, so that groups of a later quantization fit"
    )


def rank_of(info: LayerInfo, config: SvdConfig) -> int | None:
    """The rank that the config asks for; None when it depends on the data and is not resolved yet."""
    out, columns = info.shape
    if config.keep is not None:
        rank = int(config.keep * out * columns / (out + columns))
        return max(config.multiple, rank // config.multiple * config.multiple)
    return None if config.rank is None else -(-config.rank // config.multiple) * config.multiple


def factor_dtype(info: LayerInfo) -> torch.dtype:
    """Dtype of the factors: the layer's, but never one byte wide; float8 without a scale does not hold a factor."""
    return info.dtype if info.dtype.itemsize > 1 else torch.bfloat16


def factor_nbytes(info: LayerInfo, rank: int) -> int:
    """Bytes of both factors."""
    return factor_parameters(info.shape, rank) * factor_dtype(info).itemsize


def shrinks(info: LayerInfo, rank: int) -> bool:
    """Whether factors of this rank are smaller than the dense matrix."""
    return factor_nbytes(info, rank) < info.shape[0] * info.shape[1] * info.dtype.itemsize


def check(info: LayerInfo, config: SvdConfig) -> tuple[str, str] | None:
    """A factor is not factorized again, and a compressed layer must not grow."""
    if info.part or info.stored == "low_rank":
        return (f"{info.name}: is a factor of a low-rank layer already", "factorize the model it was made from")
    rank = rank_of(info, config)
    if info.stored == "dense" or rank is None:
        return None
    size = factor_nbytes(info, rank) if shrinks(info, rank) else info.shape[0] * info.shape[1] * info.dtype.itemsize
    if size < info.nbytes:
        return None
    return (
        f"{info.name}: is stored as {info.stored} in {info.nbytes} bytes; at rank {rank} it would take {size}",
        "factorize first, then compress the factors, or exclude the layer",
    )


def outline(info: LayerInfo, config: SvdConfig) -> Weight:
    """The stored weight without data."""
    rank = _resolved_rank(info, config)
    if not shrinks(info, rank):
        return Dense.outline(info.shape, info.dtype)
    dtype = factor_dtype(info)
    return LowRank(Dense.outline((info.shape[0], rank), dtype), Dense.outline((rank, info.shape[1]), dtype))


def apply(layer: Layer, config: SvdConfig) -> Weight:
    """Factorize one layer, or keep it dense where the factors would not be smaller."""
    rank = _resolved_rank(layer.info, config)
    if not shrinks(layer.info, rank):
        same = isinstance(layer.stored, Dense)
        return layer.stored if same and layer.stored else Dense(layer.weight.to(layer.info.dtype))
    out, inner = factors(layer.weight, rank)
    dtype = factor_dtype(layer.info)
    return LowRank(Dense(out.to(dtype).contiguous()), Dense(inner.to(dtype).contiguous()))


def _resolved_rank(info: LayerInfo, config: SvdConfig) -> int:
    rank = rank_of(info, config)
    if rank is None:
        raise RecipeError(f"{info.name}: its rank is not decided", "energy and target_bytes need the layer's values")
    return rank


def gram(weight: Tensor) -> Tensor:
    """The smaller of W Wᵀ and Wᵀ W, in float64, without a float64 copy of W."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.t()  # (m, n), m >= n
    total = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, tall.shape[0], ROWS):
        rows = tall[start : start + ROWS].double()
        total.addmm_(rows.t(), rows)
    return total


def squared_singular_values(weight: Tensor) -> Tensor:
    """σ² in descending order, (min(out, in),) float64."""
    ascending: Tensor = torch.linalg.eigvalsh(gram(weight))
    return ascending.flip(0).clamp_min_(0)


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U √Σ (out, rank) and √Σ Vᵀ (rank, in), float32."""
    values, vectors = torch.linalg.eigh(gram(weight))
    sigma = values.flip(0)[:rank].clamp_min(0).sqrt()
    basis = vectors[:, len(vectors) - rank :].flip(1)  # (min(out, in), rank), orthonormal columns
    root = sigma.sqrt()
    inverse = torch.where(sigma > CUTOFF * sigma[:1], 1 / root, 0)  # null directions have zero factors
    if weight.shape[0] >= weight.shape[1]:
        return weight @ (basis * inverse).float(), (basis * root).t().float()
    return (basis * root).float(), (basis * inverse).t().float() @ weight


def resolve(candidates: Sequence[Candidate[SvdConfig]], other_bytes: int) -> list[SvdConfig]:
    """Turn `energy` and `target_bytes` into a rank for every layer; each layer is read once.

    Raises:
        RecipeError: the budget does not hold even rank 1 everywhere, or a compressed layer would grow.
    """
    ranks: dict[int, int] = {}
    budgets: dict[int, list[int]] = {}
    spectra: dict[int, Tensor] = {}
    for number, candidate in enumerate(candidates):
        config = candidate.config
        if config.energy is None and config.target_bytes is None:
            other_bytes += _nbytes(candidate)
            continue
        spectra[number] = squared_singular_values(candidate.read().weight).cpu()
        if config.energy is not None:
            wanted = energy_rank(spectra.pop(number), config.energy)
            ranks[number] = -(-wanted // config.multiple) * config.multiple
            other_bytes += _nbytes(candidate, ranks[number])
        elif config.target_bytes is not None:
            budgets.setdefault(config.target_bytes, []).append(number)
    if len(budgets) > 1:
        raise RecipeError("target_bytes is given with several values", "it is the size of the whole output: give one")
    for budget, numbers in budgets.items():
        layers = [_spectrum(candidates[number], spectra[number]) for number in numbers]
        ranks.update(zip(numbers, allocate(layers, budget - other_bytes, budget), strict=True))
    resolved = [
        candidate.config.model_copy(update={"rank": ranks[number], "energy": None, "target_bytes": None})
        if number in ranks
        else candidate.config
        for number, candidate in enumerate(candidates)
    ]
    problems = (check(candidate.info, config) for candidate, config in zip(candidates, resolved, strict=True))
    raise_all([_refusal(problem) for problem in problems if problem is not None])
    return resolved


def _refusal(problem: tuple[str, str]) -> CompressError:
    return RecipeError(*problem)


def _nbytes(candidate: Candidate[SvdConfig], rank: int | None = None) -> int:
    info = candidate.info
    rank = rank or _resolved_rank(info, candidate.config)
    return min(factor_nbytes(info, rank), info.shape[0] * info.shape[1] * info.dtype.itemsize)


def _spectrum(candidate: Candidate[SvdConfig], gains: Tensor) -> Spectrum:
    info = candidate.info
    return Spectrum(
        gains,
        factor_nbytes(info, 1),
        info.shape[0] * info.shape[1] * info.dtype.itemsize,
        candidate.config.multiple,
    )


def energy_rank(squares: Tensor, energy: float) -> int:
    """Smallest r with Σ_{i<=r} σ² >= energy Σ σ²; at least 1."""
    held = squares.cumsum(0)
    return int((held < energy * held[-1]).sum().clamp_max(len(squares) - 1)) + 1


def describe(config: SvdConfig, weight: Weight) -> dict[str, Any]:
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


METHOD = LayerMethod(
    name="svd",
    command="factorize",
    summary="truncated singular value decomposition, by rank, energy, share of parameters or bytes; data-free",
    when="layers whose singular values fall off, before a distillation; quantization mostly saves more for less",
    config=SvdConfig,
    apply=apply,
    outline=outline,
    check=check,
    allocates=Allocates(resolve),
    describe=describe,
)
