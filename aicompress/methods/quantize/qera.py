"""A quantized weight plus the low-rank matrix that best corrects its output error.

Zhang et al. 2025, "QERA", arXiv:2410.06040, theorem 1 (QERA-exact): of all U V of rank r, the least
tr((W − Q − U V) H (W − Q − U V)ᵀ) has U V = SVD_r((W − Q) H^½) H^-½. Any other method of quantization gives Q; with
more than one round, Q is then made anew for W − U V (LoftQ, arXiv:2310.08659, algorithm 1). Where the
base aims at the original model's outputs (`shift`), W is what it aims at, for the correction as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Reads
from aicompress.methods.curvature import damped, loss, raw_gram, shifted
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.quantize.grid.wrapped import BasedConfig, base_of, base_shift
from aicompress.weights import Corrected, Dense, LowRank, Weight
from aicompress.weights.stored.corrected import correction_dtype


class QeraConfig(BasedConfig):
    """Parameters of qera."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"rank": 2, "base": {"name": "gptq", "bits": 3, "granularity": "channel"}},
                {"rank": 1, "base": {"name": "rtn", "granularity": "tensor"}, "rounds": 2},
                {"rank": 1, "base": {"name": "nf4", "granularity": "channel"}},
            ]
        }
    )

    lends = frozenset({"gram", "norms"})  # what a Gram matrix gives a base method
    unfit = "cannot be corrected"
    refuses = frozenset({"qera"})

    name: Literal["qera"] = "qera"
    rank: int = Field(16, ge=1, description="of the correction")
    rounds: int = Field(1, ge=1, le=100, description="how often quantization and correction take turns")
    damping: float = Field(0.01, gt=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")


def check(info: LayerInfo, config: QeraConfig) -> tuple[str, str] | None:
    """The rank must fit the layer, and the base method too."""
    limit = min(info.shape)
    if config.rank > limit:
        return f"{info.name}: rank {config.rank} exceeds its smaller side {limit}", f"rank: at most {limit}"
    method, base = base_of(config)
    return method.check(info, base)


def outline(info: LayerInfo, config: QeraConfig) -> Weight:
    """The stored weight without data."""
    method, base = base_of(config)
    (out, columns), dtype = info.shape, correction_dtype(info.dtype)
    factors = LowRank(Dense.outline((out, config.rank), dtype), Dense.outline((config.rank, columns), dtype))
    return Corrected(method.outline(info, base), factors)


def apply(layer: Layer, config: QeraConfig) -> Weight:
    """Quantize one layer and correct it; of several rounds, the best is kept.

    Raises:
        CompressError: no calibration token reached the layer, or its Gram matrix is not one.
        Refused: as the base method.
    """
    hessian = damped(raw_gram(layer), config.damping)
    method, base = base_of(config)
    weight = shifted(layer, base_shift(config), lambda x: torch.linalg.solve(hessian, x.double().t()).t())
    layer = replace(layer, inputs=layer.inputs and replace(layer.inputs, cross=layer.inputs.gram))  # it is shifted now
    target, best, corrected = weight, float("inf"), None
    for _ in range(config.rounds):
        quantized = method.apply(replace(layer, weight=target), base)
        correction = correct(weight - quantized.dense(), hessian, config.rank, correction_dtype(layer.info.dtype))
        candidate = Corrected(quantized, correction)
        error = loss(weight - candidate.dense(), hessian)
        if error < best:
            best, corrected = error, candidate
        target = weight - correction.dense()
    assert corrected is not None
    return corrected


def correct(error: Tensor, hessian: Tensor, rank: int, dtype: torch.dtype) -> LowRank:
    """The best low-rank approximation of an error.

    Args:
        error: W − Q, (out, in).
        hessian: H, (in, in) float64, positive definite.
        rank: of the approximation.
        dtype: of the factors. The singular values are shared evenly, so that both factors have the same range.
    """
    values, vectors = torch.linalg.eigh(hessian)
    roots = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    u, s, vt = torch.linalg.svd((error.double() @ vectors) * roots, full_matrices=False)
    half = s[:rank].sqrt()
    inner = (half[:, None] * vt[:rank] / roots) @ vectors.t()
    return LowRank(Dense((u[:, :rank] * half).to(dtype).contiguous()), Dense(inner.to(dtype).contiguous()))


def describe(config: QeraConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    method, base = base_of(config)
    assert isinstance(weight, Corrected)
    return {"base": method.name, "rank": config.rank, **method.describe(base, weight.base)}


METHOD = LayerMethod(
    name="qera",
    command="quantize",
    summary="another method plus a low-rank correction of its output error; calibrated",
    when="2 or 3 bits that lose too much, where a few more bytes may win part of it back",
    config=QeraConfig,
    needs=frozenset({"gram"}),
    apply=apply,
    outline=outline,
    check=check,
    describe=describe,
    reading=Reads[QeraConfig](shift=base_shift),
)
