"""Truncated singular value decomposition: W ≈ (U √Σ)(√Σ Vᵀ), the closest matrix of its rank; data-free.

Eckart and Young 1936: ‖W − W_r‖²_F = Σ_{i>r} σ_i², the least of all matrices of rank r. The decomposition is the
eigendecomposition of the smaller Gram matrix in float64: exact for every σ_i above 1e-7 σ_1, and 2 to 3.5 times as fast
as the LAPACK SVD (1024 x 4096 and 384 x 1536 on two cores). Few directions of a large matrix are found by a randomized
range finder with power iterations: Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.

Other methods without data hold a block of rows of a matrix. Here it is held whole in float32, since the right factor is
of all its rows, and a weight is written once both of its factors are there; the Gram matrix is added up from blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from aicompress.layer import Layer
from aicompress.measure import squared_sums
from aicompress.methods.capabilities import Candidate, Rounded
from aicompress.methods.decisions import Allocates, Setting, Surveys
from aicompress.methods.factorize.budget import allocation
from aicompress.methods.factorize.budget.rounding import rounded
from aicompress.methods.factorize.budget.sizes import Gains, R, RankConfig, alike, check, describe, outline, stored
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.weights import Weight

# From this side on, and up to this share of it, the randomized decomposition is 4 (1024 x 4096, rank 64) to 12 times as
# fast (4096 x 4096, rank 256), and its error within 1 % of the least: 0.5 and 0.7 % above it on white noise, whose
# singular values fall most slowly; two iterations miss it there.
LARGE, SHARE = 1024, 16
OVERSAMPLING, POWER_ITERATIONS = 10, 4
CUTOFF = 1e-7  # of the largest singular value: what a float64 Gram matrix resolves
BLOCK = 1 << 21  # elements converted to float64 at a time


class SvdConfig(RankConfig):
    """Parameters of svd."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"keep": 0.5}, {"rank": 4}, {"energy": 0.9}, {"rank": 3, "multiple": 2}]}
    )

    name: Literal["svd"] = "svd"


def apply(layer: Layer, config: SvdConfig) -> Weight:
    """Factorize one layer, or keep it dense where the factors would not be smaller."""
    return stored(layer, config, partial(factors, layer.weight, seed=layer.seed))


def gram(weight: Tensor) -> Tensor:
    """The smaller of W Wᵀ and Wᵀ W, in float64, without a float64 copy of W."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.t()  # (m, n), m >= n
    total = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=weight.device)
    step = max(1, BLOCK // max(1, tall.shape[1]))
    for start in range(0, tall.shape[0], step):
        _add_gram(total, tall[start : start + step].double())
    return total


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows; what is only held by the call is free before the next block is made."""
    total.addmm_(rows.t(), rows)


def squared_singular_values(weight: Tensor) -> Tensor:
    """σ² in descending order, (min(out, in),) float64."""
    ascending: Tensor = torch.linalg.eigvalsh(gram(weight))
    return ascending.flip(0).clamp_min_(0)


def factors(weight: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """U √Σ (out, rank) and √Σ Vᵀ (rank, in), float32."""
    side = min(weight.shape)
    return _randomized(weight, rank, seed) if side >= LARGE and SHARE * rank <= side else _exact(weight, rank)


def _randomized(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Factors of W projected on a basis Q of about its leading left singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(weight.shape[1], rank + OVERSAMPLING, generator=generator).to(weight.device)
    basis = torch.linalg.qr(weight @ probes).Q  # (out, rank + oversampling)
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ basis).Q).Q
    out, inner = _exact(basis.t() @ weight, rank)
    return basis @ out, inner


def _exact(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram(weight))
    sigma = values.flip(0)[:rank].clamp_min(0).sqrt()
    basis = vectors[:, len(vectors) - rank :].flip(1)  # (min(out, in), rank), orthonormal columns
    root = sigma.sqrt()
    inverse = torch.where(sigma > CUTOFF * sigma[:1], 1 / root, 0)  # null directions have zero factors
    if weight.shape[0] >= weight.shape[1]:
        return weight @ (basis * inverse).float(), (basis * root).t().float()
    return (basis * root).float(), (basis * inverse).t().float() @ weight


def gains(candidate: Candidate[R]) -> Gains:
    """σ² of a layer, which is read."""
    return Gains(squared_singular_values(candidate.read().weight))


def resolve(candidates: Sequence[Candidate[SvdConfig]], other_bytes: int) -> list[SvdConfig]:
    """Turn `energy` and `target_bytes` into a rank for every layer, which is read once; `max_kl` is left to a survey.

    Raises:
        RecipeError: the budget does not hold even rank 1 everywhere, or a compressed layer would grow.
    """
    estimates = allocation.resolve(candidates, other_bytes, gains)
    return allocation.still_open(candidates, estimates, lambda config: config.tried)


def decide(candidates: Sequence[Candidate[SvdConfig]], setting: Setting) -> list[SvdConfig]:
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
    check=check,
    allocates=Allocates(resolve, alike),
    surveys=Surveys(lambda config: frozenset(), decide, lambda config: config.tried),
    describe=describe,
    rounded=alternative,
)
