"""Hadamard rotation of the residual stream, folded into the weights, before any method quantizes them.

Ashkboos et al. 2024, "QuaRot", arXiv:2404.00456, section 4, stage 1; Liu et al. 2024, "SpinQuant", arXiv:2405.16406,
rotation R1. A model whose blocks read their residual stream x through norms computes the same from x R for orthogonal
R: embeddings E → E R, W → Rᵀ W where the stream is written, W → W diag(γ) R where it is read behind a norm's weight γ.
Outliers of single channels are spread over all of them, and weights lose the columns that need a wide grid. Norms that
subtract the mean need R 1 = 1; then R = Q diag(±1) Qᵀ instead of diag(±1) Q.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Reads, Rotates, RowWise
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.quantize.grid.orthogonal import OrthogonalMatrix, rotation
from aicompress.methods.quantize.grid.wrapped import BasedConfig, base_of, base_shift
from aicompress.weights import Weight

NEEDS = frozenset({"gram", "norms", "mean_abs", "max_abs", "mean"})  # what some base reads


class HadamardConfig(BasedConfig):
    """Parameters of hadamard."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"base": {"name": "gptq", "bits": 3, "granularity": "channel"}},
                {"base": {"name": "rtn", "granularity": "tensor"}},
            ]
        }
    )

    lends = NEEDS
    unfit = "cannot quantize a rotated model"

    name: Literal["hadamard"] = "hadamard"
    untie: bool = Field(
        False,
        description="give the output head a matrix of its own where it shares the embedding's: rotated, they differ",
    )


def reads(config: HadamardConfig) -> frozenset[str]:
    """Statistics that the base method reads."""
    method, base = base_of(config)
    return method.reads(base)


def check(info: LayerInfo, config: HadamardConfig) -> tuple[str, str] | None:
    """As the base method."""
    method, base = base_of(config)
    return method.check(info, base)


def outline(info: LayerInfo, config: HadamardConfig) -> Weight:
    """The stored weight without data."""
    method, base = base_of(config)
    return method.outline(info, base)


def apply(layer: Layer, config: HadamardConfig) -> Weight:
    """Quantize one layer of the rotated model.

    Raises:
        CompressError, Refused: as the base method.
    """
    method, base = base_of(config)
    return method.apply(layer, base)


def residual_rotation(width: int, centred: bool, seed: int) -> OrthogonalMatrix:
    """A random rotation of a residual stream."""
    return rotation(width, centred, torch.Generator().manual_seed(seed))


def describe(config: HadamardConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    method, base = base_of(config)
    return {**method.describe(base, weight), "base": method.name}


def by_rows(config: HadamardConfig) -> bool:
    """Whether the base method compresses rows independently, and reads no statistics."""
    method, base = base_of(config)
    apart = method.row_wise
    return apart is not None and not method.reads(base) and apart.independent(base) and not apart.parted(base)


def multiple(config: HadamardConfig) -> int:
    """As the base method."""
    method, base = base_of(config)
    return 1 if method.row_wise is None else method.row_wise.multiple(base)


METHOD = LayerMethod(
    name="hadamard",
    command="quantize",
    summary="the residual stream rotated offline, then another method; outliers spread over all channels",
    when="a residual stream with large outliers, at 4 bits and fewer; where it has none, its base alone does as well",
    config=HadamardConfig,
    needs=NEEDS,
    apply=apply,
    outline=outline,
    check=check,
    row_wise=RowWise(by_rows, multiple=multiple, exact=False),
    describe=describe,
    reading=Reads(reads, base_shift),
    rotates=Rotates(residual_rotation, lambda config: config.untie),
)
