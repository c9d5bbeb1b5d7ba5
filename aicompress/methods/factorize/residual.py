"""A low-rank part at high precision, and the rest in few bits: W ≈ Q + U V.

Zhang et al. 2024, LQER, arXiv:2402.02446, quantizes W (out, in) and corrects the error by U V (out, rank)(rank, in);
Zhang et al. 2025, QERA, arXiv:2410.06040, theorem 1, has the best one in closed form: U V S = SVD_r((W − Q) S) with
S Sᵀ = E[x xᵀ]. SRR, arXiv:2602.02001, keeps the top k directions of W S out of what is quantized, so that they stretch
no range: Q = quantize(W − SVD_k(W S) S⁻¹). With Q given, theorem 1 is at least as good as these k directions and rank
r − k for the error, so the whole rank is found by it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Reads, Rounded
from aicompress.methods.curvature import raw_gram, shifted
from aicompress.methods.factorize.budget.sizes import dense_nbytes, kept_dense
from aicompress.methods.factorize.weighting.roots import Root, Weighting
from aicompress.methods.factorize.weighting.rounding import weighed_rounding
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.quantize.grid.wrapped import BasedConfig, base_of
from aicompress.weights import Corrected, Dense, LowRank, Weight, outline_nbytes
from aicompress.weights.stored.corrected import correction_dtype


class ResidualConfig(BasedConfig):
    """Parameters of residual."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"rank": 2, "base": {"name": "rtn", "bits": 3, "granularity": "channel"}},
            ]
        }
    )

    lends = frozenset({"gram", "norms"})  # what a Gram matrix gives a base method
    unfit = "cannot quantize what a low-rank part leaves"
    refuses = frozenset({"qera"})

    name: Literal["residual"] = "residual"
    rank: int = Field(16, ge=1, description="of the low-rank part; at most the layer's smaller side is taken")
    preserve: int | None = Field(
        None,
        ge=0,
        description="directions that are taken out before the rest is quantized; without it none, half of the rank or "
        "all of it, whichever changes the layer's output least",
    )
    damping: float = Field(0.01, ge=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")
    shift: float = Field(
        0.0, ge=0, le=1, description="how far the target moves to make up for what compressed layers before it changed"
    )


def rank_of(info: LayerInfo, config: ResidualConfig) -> int:
    """The rank of a layer's low-rank part."""
    return min(config.rank, *info.shape)


def quantized(info: LayerInfo, config: ResidualConfig) -> Weight:
    """What is stored where that is smaller than the matrix, without data."""
    method, base = base_of(config)
    (out, columns), rank, dtype = info.shape, rank_of(info, config), correction_dtype(info.dtype)
    factors = LowRank(Dense.outline((out, rank), dtype), Dense.outline((rank, columns), dtype))
    return Corrected(method.outline(info, base), factors)


def outline(info: LayerInfo, config: ResidualConfig) -> Weight:
    """The stored weight without data."""
    smaller = quantized(info, config)
    return smaller if outline_nbytes(smaller) < dense_nbytes(info) else Dense.outline(info.shape, info.dtype)


def check(info: LayerInfo, config: ResidualConfig) -> tuple[str, str] | None:
    """A factor is not factorized again, a compressed layer must not grow, and the base method must fit."""
    if info.part or info.stored == "low_rank":
        return f"{info.name}: is a factor of a low-rank layer already", "quantize the factors, or start from its model"
    method, base = base_of(config)
    problem = method.check(info, base)
    size = 0 if problem is not None or info.stored == "dense" else outline_nbytes(outline(info, config))
    if size <= info.nbytes:
        return problem
    return (
        f"{info.name}: is stored as {info.stored} in {info.nbytes} bytes; with rank {rank_of(info, config)} beside "
        f"{method.name} it would take {size}",
        "start from the model it was made from, or exclude the layer",
    )


def apply(layer: Layer, config: ResidualConfig) -> Weight:
    """Find the low-rank part and the codes of one layer, or keep it dense where they would not be smaller.

    Raises:
        CompressError: no calibration token reached the layer, or its inputs are not finite.
        Refused: as the base method.
    """
    if isinstance(outline(layer.info, config), Dense):
        return kept_dense(layer)
    weighting = Weighting(Root.of(raw_gram(layer), config.damping))
    target = shifted(layer, config.shift, weighting.inputs.solve)
    rank = rank_of(layer.info, config)
    directions = {0, rank // 2, rank} if config.preserve is None else {min(config.preserve, rank)}
    candidates = [split(layer, config, target, weighting, preserved) for preserved in sorted(directions)]
    if len(candidates) == 1:
        return candidates[0]
    errors = [float(weighting.of(target - candidate.dense()).square().sum()) for candidate in candidates]
    return candidates[errors.index(min(errors))]


def split(layer: Layer, config: ResidualConfig, target: Tensor, weighting: Weighting, preserved: int) -> Corrected:
    """Codes of what some top directions leave of a layer, and the best low-rank part beside them.

    Args:
        layer: the layer.
        config: gives the rank and the method that quantizes.
        target: what the layer should be, (out, in).
        weighting: what its error counts.
        preserved: directions that are not quantized.
    """
    method, base = base_of(config)
    rest = target
    if preserved:
        out, inner = weighting.factors(target, preserved)
        rest = target - out @ inner
    inputs = layer.inputs and replace(layer.inputs, cross=layer.inputs.gram)  # the target is shifted already
    codes = method.apply(replace(layer, weight=rest, stored=Dense(rest), inputs=inputs), base)
    dtype = correction_dtype(layer.info.dtype)
    out, inner = weighting.factors(target - codes.dense(), rank_of(layer.info, config))
    return Corrected(codes, LowRank(Dense(out.to(dtype).contiguous()), Dense(inner.to(dtype).contiguous())))


def alternative(layer: Layer, config: ResidualConfig, weight: Weight, nbytes: int) -> Rounded | None:
    """What rounding a layer to more bits, with no low-rank part, would lose."""
    return weighed_rounding(layer, weight, nbytes, Weighting(Root.of(raw_gram(layer), config.damping)))


def describe(config: ResidualConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    method, base = base_of(config)
    if isinstance(weight, Corrected):
        return {"base": method.name, "rank": weight.correction.rank, **method.describe(base, weight.base)}
    return {"base": method.name, "note": f"rank {config.rank} and codes would not make it smaller: kept dense"}


METHOD = LayerMethod(
    name="residual",
    command="factorize",
    summary="a low-rank part of a layer, and the rest of it quantized by any method of quantize; calibrated",
    when="layers with a few strong directions at 2 to 4 bits; where none stand out, more bits win more than a rank",
    config=ResidualConfig,
    needs=frozenset({"gram"}),
    apply=apply,
    outline=outline,
    check=check,
    describe=describe,
    rounded=alternative,
    reading=Reads[ResidualConfig](shift=lambda config: config.shift),
)
