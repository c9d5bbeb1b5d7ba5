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
from pydantic import ConfigDict, Field, field_validator

from aicompress.errors import RecipeError
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.methods.quantize.orthogonal import Rotation, rotation
from aicompress.methods.quantize.widths import open_bits
from aicompress.methods.registry import get
from aicompress.weights import Weight

NEEDS = frozenset({"gram", "norms", "mean_abs", "max_abs", "mean"})  # what some base reads


class HadamardConfig(MethodConfig):
    """Parameters of hadamard."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"base": {"name": "gptq", "bits": 3, "granularity": "channel"}},
                {"base": {"name": "rtn", "granularity": "tensor"}},
            ]
        }
    )

    name: Literal["hadamard"] = "hadamard"
    base: dict[str, Any] = Field(
        {"name": "gptq"}, description="the method that quantizes, with its parameters, as a method: section gives them"
    )
    untie: bool = Field(
        False,
        description="give the output head a matrix of its own where it shares the embedding's: rotated, they differ",
    )

    @field_validator("base")
    @classmethod
    def _known(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The method exists, rewrites nothing itself, and takes these parameters."""
        try:
            method = get("quantize", str(given.get("name")))
        except RecipeError as error:
            raise ValueError(f"{error.message}; {error.hint}") from None
        if not isinstance(method, LayerMethod) or method.rewrites or not method.needs <= NEEDS:
            raise ValueError(f"{method.name} cannot quantize a rotated model")
        config = method.config(**given)
        if open_bits(config):
            raise ValueError("base needs explicit bits")
        return config.model_dump()


def base_of(config: HadamardConfig) -> tuple[LayerMethod, MethodConfig]:
    """The method that quantizes, and its parameters."""
    method = get("quantize", config.base["name"])
    assert isinstance(method, LayerMethod)
    return method, method.config(**config.base)


def spares(config: HadamardConfig) -> frozenset[str]:
    """Statistics that the base method does without."""
    method, base = base_of(config)
    return NEEDS - method.reads(base)


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


def turned(width: int, centred: bool, seed: int) -> Rotation:
    """The rotation of a residual stream."""
    return rotation(width, centred, torch.Generator().manual_seed(seed))


def describe(config: HadamardConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    method, base = base_of(config)
    return {**method.describe(base, weight), "base": method.name}


def compares(config: HadamardConfig) -> bool:
    """Whether the base method reads the original model's inputs."""
    method, base = base_of(config)
    return method.compares(base)


METHOD = LayerMethod(
    name="hadamard",
    command="quantize",
    summary="the residual stream rotated offline, then another method; outliers spread over all channels",
    config=HadamardConfig,
    needs=NEEDS,
    apply=apply,
    outline=outline,
    check=check,
    describe=describe,
    compares=compares,
    rotation=turned,
    spares=spares,
)
