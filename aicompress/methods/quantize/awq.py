"""AWQ: rescale the inputs so that the channels with large activations are rounded finely, then round.

Lin et al. 2023, arXiv:2306.00978, equations 4 and 5: with s = (mean |x|)^α / √(max · min), the weight is rounded as
Q(W diag(s)) diag(s)⁻¹. The division by s is folded into whatever makes the input, so that nothing is left of it when
the model runs. α is the one of a grid with the least output error tr((W − Ŵ) H (W − Ŵ)ᵀ), summed over all layers that
read the input, from the Gram matrix H = E[x xᵀ] alone. Clipping, the second half of the method, is what `base: imatrix`
does: scales of least error weighted by E[x²].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.layer import Layer
from aicompress.methods.capabilities import Candidate, Reads, Rescales, ScalingFactors
from aicompress.methods.curvature import gram, loss, statistics
from aicompress.methods.decisions import Allocates
from aicompress.methods.layerwise import AnyLayerMethod, LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.methods.quantize.grid.integer import (
    IntegerConfig,
    check,
    describe,
    outline,
    resolve,
    searched,
    shared_columns,
    sketched,
    stored_scale_dtype,
)
from aicompress.methods.quantize.grid.rounding import decode, encode, grouped
from aicompress.methods.quantize.grid.scales import full_range, least_error
from aicompress.methods.registry import get
from aicompress.weights import Weight

ROWS = 128  # of a layer that the search looks at: errors of rows are alike, and a large layer has thousands
BESIDE = ("bits", "granularity", "group_size", "pad", "symmetric", "scale_dtype")  # what a base is given
COARSE = 4  # every so many exponents are tried first, then those around the best of them
FLOOR = 1e-3  # of the mean: the least activation that counts


class AwqConfig(IntegerConfig):
    """Parameters of awq."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"bits": 3, "group_size": 4, "symmetric": False, "base": {"name": "rtn"}},
                {"bits": 2, "granularity": "channel", "base": {"name": "gptq", "refine": 1}},
            ]
        }
    )

    name: Literal["awq"] = "awq"
    base: dict[str, Any] = Field(
        {"name": "imatrix"},
        description="what rounds the rescaled weight: rtn, imatrix (clips for least weighted error) or gptq, with its "
        "own parameters; bits, groups and scales are given beside it",
    )
    steps: int = Field(20, ge=1, le=1000, description="exponents α that the search tries between 0 and 1")

    @field_validator("base")
    @classmethod
    def _known(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The method exists, gives integer codes, and takes these parameters."""
        name = given.get("name")
        if name not in ("rtn", "imatrix", "gptq"):
            raise ValueError(f"base is one of rtn, imatrix, gptq, not {name!r}")
        given_beside = sorted(given.keys() & (IntegerConfig.model_fields.keys() - {"name"}))
        if given_beside:
            raise ValueError(f"{given_beside[0]} is given beside base, not in it")
        try:
            method = get("quantize", str(name))
        except RecipeError as error:
            raise ValueError(f"{error.message}; {error.hint}") from None
        method.config(**given)
        return given


def base_of(config: AwqConfig) -> tuple[AnyLayerMethod, MethodConfig]:
    """The method that rounds, and its parameters."""
    method = get("quantize", config.base["name"])
    assert isinstance(method, LayerMethod)
    return method, method.config(**{**{field: getattr(config, field) for field in BESIDE}, **config.base})


def scaling_factors(
    candidates: Sequence[Candidate[AwqConfig]], pooled: Callable[[Tensor], Tensor]
) -> ScalingFactors | None:
    """The factors of the best exponent for one input.

    Args:
        candidates: the layers that read it.
        pooled: makes factors equal that must be.

    Raises:
        CompressError: the statistics of a layer are not finite.
    """
    layers = [(candidate.read(), candidate.config) for candidate in candidates]
    seen = [(_some_rows(layer), config) for layer, config in layers if layer.inputs is not None and layer.inputs.count]
    if not seen:
        return None
    size = mean_abs([layer for layer, _ in seen])
    grams: dict[int, Tensor] = {}  # layers that are given the same tensor share their statistics
    for layer, _ in seen:
        if id(layer.inputs) not in grams:
            grams[id(layer.inputs)] = gram(layer).float()
    steps = max(config.steps for _, config in seen)

    def factors(step: int) -> Tensor:
        return pooled(scaled_to(size, step / steps))

    def error(step: int) -> float:
        scales = factors(step)
        return sum(rounding_error(layer, scales, config, grams[id(layer.inputs)]) for layer, config in seen)

    best = least(steps, error)
    return ScalingFactors(factors(best), f"inputs rescaled with exponent {best / steps:.2f}") if best else None


def least(steps: int, error: Callable[[int], float]) -> int:
    """The step from 0 to `steps` of least error, the first of equal ones: coarsely first, then around the best.

    Errors fall and rise again as the exponent grows, up to the noise of rounding; one that is no number is not least.
    """
    errors: dict[int, float] = {}

    def best_of(tried: Iterable[int]) -> int:
        for step in tried:
            measured = errors[step] if step in errors else error(step)
            errors[step] = float("inf") if math.isnan(measured) else measured
        return min(sorted(errors), key=errors.__getitem__)

    coarse = best_of((*range(0, steps, COARSE), steps))
    return best_of(range(max(0, coarse - COARSE + 1), min(steps, coarse + COARSE)))


def _some_rows(layer: Layer) -> Layer:
    """A layer with at most `ROWS` of its rows, evenly spaced."""
    step = -(-layer.weight.shape[0] // ROWS)
    return Layer(layer.info, layer.weight[::step].contiguous(), None, layer.inputs, layer.seed)


def mean_abs(layers: Sequence[Layer]) -> Tensor:
    """Mean |x| of an input over all layers that read it, (in,); of experts each sees tokens of its own."""
    total, count = torch.zeros(layers[0].weight.shape[1]), 0
    for layer in layers:
        inputs = statistics(layer)
        assert inputs.mean_abs is not None
        total, count = total + inputs.mean_abs * inputs.count, count + inputs.count
    return total / count


def scaled_to(size: Tensor, exponent: float) -> Tensor:
    """s = size^α / √(max · min), (in,); a dead input counts as a very small one."""
    mean = size.mean()
    if not mean > 0:
        return torch.ones_like(size)
    factors = size.clamp_min(FLOOR * mean).pow(exponent)
    return factors / (factors.max() * factors.min()).sqrt()


def rounding_error(layer: Layer, factors: Tensor, config: AwqConfig, hessian: Tensor) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ) for Ŵ = Q(W s)/s rounded to nearest, with the scales that the base method takes."""
    scaled, dtype = layer.weight * factors, stored_scale_dtype(config, layer.info.dtype)
    if config.base["name"] == "rtn":
        scale, zero = full_range(scaled, config, dtype)
    else:
        scale, zero = least_error(scaled, hessian.diagonal() / factors.square(), config, dtype)
    groups = grouped(scaled, shared_columns(config), config.granularity == "tensor")
    rounded = decode(encode(groups, scale, zero, config.bits), scale, zero).reshape(scaled.shape)
    return loss((scaled - rounded) / factors, hessian)


def apply(layer: Layer, config: AwqConfig) -> Weight:
    """Round one rescaled layer.

    Raises:
        CompressError: as the base method.
        Refused: as the base method.
    """
    method, base = base_of(config)
    return method.apply(layer, base)


def shift(config: AwqConfig) -> float:
    """How far the base method moves its target."""
    method, base = base_of(config)
    return method.shift(base)


METHOD = LayerMethod(
    name="awq",
    command="quantize",
    summary="inputs rescaled by their activations, folded into the layer before; calibrated",
    when="a few input channels far larger than the others, at 4 bits; where none stand out gptq loses less",
    config=AwqConfig,
    needs=frozenset({"gram", "mean_abs"}),
    apply=apply,
    outline=outline,
    check=check,
    allocates=Allocates(resolve),
    widths=searched(AwqConfig, sketched),
    describe=describe,
    reading=Reads(shift=shift),
    rescales=Rescales(scaling_factors),
)
