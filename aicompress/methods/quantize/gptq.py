"""GPTQ: round the columns in turn and move each one's error into those not rounded yet.

Frantar et al. 2023, arXiv:2210.17323, equations 2 and 3 and algorithm 1, with these later additions: scales fixed
before the columns are permuted (static groups) and searched for least error weighted by the inputs; the target shifted
to W* = W E[x̃ xᵀ] H⁻¹ where the uncompressed model's inputs x̃ are known (GPTAQ, arXiv:2504.02692; Qronos,
arXiv:2505.11695); with `refine`, sweeps that round every column again given all others and fit the scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Batched, Prepares, Reads, TwoSided
from aicompress.methods.curvature import energies, inverse_factor, permuted, raw_gram, shifted
from aicompress.methods.decisions import Allocates
from aicompress.methods.effort import Effort, Level, one_pass
from aicompress.methods.layerwise import STACKED, LayerMethod, stacks
from aicompress.methods.quantize.grid import integer, two_sides
from aicompress.methods.quantize.grid.columns import ColumnGrid, round_columns
from aicompress.methods.quantize.grid.coordinate_descent import refine
from aicompress.methods.quantize.grid.integer import (
    IntegerConfig,
    check,
    resolve,
    searched,
    shared_columns,
    sketched,
    stored_scale_dtype,
)
from aicompress.methods.quantize.grid.rounding import require_scales
from aicompress.methods.quantize.grid.scales import full_range, least_error
from aicompress.weights import IntGrouped, Weight

METRIC_DAMPING = 1e-4  # added to P, as a part of its mean diagonal


class GptqConfig(IntegerConfig):
    """Parameters of gptq."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"bits": 3, "group_size": 4, "symmetric": False, "refine": 3},
                {"bits": 2, "granularity": "channel", "shift": 0.5},
                {"bits": 4, "granularity": "tensor", "order": "natural", "activation_bits": 8},
            ]
        }
    )

    name: Literal["gptq"] = "gptq"
    order: Literal["importance", "natural"] = Field(
        "importance", description="columns with the largest inputs first, or left to right"
    )
    damping: float = Field(0.05, gt=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")
    range: Literal["minmax", "mse", "weighted"] = Field(
        "weighted", description="scales: full range, least squared error, or least error weighted by 1 / (H⁻¹)_jj"
    )
    shift: float = Field(
        0.0, ge=0, le=1, description="how far the target moves to make up for what compressed layers before it changed"
    )
    refine: int = Field(2, ge=0, le=100, description="rounds of coordinate descent and scale fitting after GPTQ")
    activation_bits: Literal[8] | None = Field(
        None, description="also quantize the inputs of linear layers, per token, when running"
    )

    @model_validator(mode="after")
    def _activations_are_symmetric(self) -> GptqConfig:
        if self.activation_bits and not self.symmetric:
            raise ValueError("activation_bits needs symmetric: true")
        return self


@dataclass(frozen=True)
class Basis:
    """What the rounding of a layer takes from its inputs alone.

    Attributes:
        order: (in,) the order of rounding.
        sorted: H in the order of rounding, float32.
        coupling: (in, in) float32: C / diag(C) with H⁻¹ = Cᵀ C, in the order of rounding.
        pivots: diag(C), (in,) float32.
        saliency: 1 / (H⁻¹)_jj, (in,) float32, inputs in their own order.
    """

    order: Tensor
    sorted: Tensor
    coupling: Tensor
    pivots: Tensor
    saliency: Tensor

    @classmethod
    def of(cls, layer: Layer, config: GptqConfig) -> Basis:
        """From a layer's Gram matrix.

        Raises:
            CompressError: no calibration token reached the layer, or its Gram matrix is not one.
        """
        gram = raw_gram(layer)
        order = torch.arange(len(gram))
        if config.order == "importance":
            order = energies(gram).argsort(descending=True, stable=True)
        factor, diagonal = inverse_factor(gram, config.damping, order)
        saliency = torch.empty(len(order))
        saliency[order] = torch.linalg.vector_norm(factor, dim=0).pow_(-2).float()
        pivots = factor.diagonal().clone()
        coupling = factor.div_(pivots[:, None]).float()
        del factor  # before the next matrix of its size
        hessian = permuted(gram, order, torch.empty(gram.shape))
        hessian.diagonal().copy_(diagonal)
        return cls(order, hessian, coupling, pivots.float(), saliency)

    def over(self, x: Tensor) -> Tensor:
        """X H⁻¹ for X (rows, in), inputs in their own order."""
        product = torch.empty(x.shape)
        pulled = (x[:, self.order].float() @ self.coupling.t()).mul_(self.pivots.square())
        product[:, self.order] = pulled @ self.coupling
        return product


def apply(layer: Layer, config: GptqConfig) -> Weight:
    """Quantize one layer.

    Raises:
        CompressError: no calibration token reached the layer, or its Gram matrix is not one.
        Refused: its values are too large for the scales' dtype.
    """
    return batched([layer], config)[0]


def batched(layers: Sequence[Layer], config: GptqConfig) -> list[Weight]:
    """Quantize layers that are given the same inputs: one factorization, and their rows rounded at once.

    Raises:
        CompressError, Refused: as `apply`.
    """
    return _rounded(layers, Basis.of(layers[0], config), config)


def onto(layer: Layer, config: GptqConfig) -> Callable[[Layer], Weight]:
    """A function that quantizes layers with the inputs of one, which are worked on once.

    Raises:
        CompressError, Refused: as `apply`.
    """
    basis = Basis.of(layer, config)
    return lambda each: _rounded([each], basis, config)[0]


def by_both_sides(layer: Layer, metric: Tensor, config: GptqConfig) -> Weight | None:
    """Quantize a layer whose errors count by both sides; None where all rows share a scale, or without numba.

    Args:
        layer: the layer.
        metric: P, (out, out).
        config: parameters; of `refine` it matters whether it is 0.

    Raises:
        CompressError, Refused: as `apply`.
    """
    if config.granularity == "tensor" or not config.refine or not two_sides.can_round():
        return None
    basis = Basis.of(layer, config)
    target, dtype = shifted(layer, config.shift, basis.over), stored_scale_dtype(config, layer.info.dtype)
    scale, zero = _scales(target, basis, config, dtype)
    require_scales(scale, layer.info.name)
    rows, diagonal = inverse_factor(metric, METRIC_DAMPING)
    rows, weighed = rows.div_(rows.diagonal().clone()[:, None]).float(), metric.float()
    weighed.diagonal().copy_(diagonal)
    sides = two_sides.DampedSides(basis.sorted, basis.coupling, weighed, rows)
    wanted = target.t()[basis.order].contiguous()
    codes, levels = two_sides.rounded(wanted, sides, grid_of(scale, zero, config, basis.order), dtype)
    unsorted = torch.empty(codes.shape[::-1], dtype=torch.int8)
    unsorted[:, basis.order] = codes.t().to(torch.int8)
    scale = levels.scale.t().to(dtype).contiguous()
    return IntGrouped(unsorted, scale, zero, config.bits, shared_columns(config), _input_bits(layer.info, config))


def _scales(target: Tensor, basis: Basis, config: GptqConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that rounding starts from."""
    if config.range == "minmax":
        return full_range(target, config, dtype)
    return least_error(target, basis.saliency if config.range == "weighted" else None, config, dtype)


def _rounded(layers: Sequence[Layer], basis: Basis, config: GptqConfig) -> list[Weight]:
    """Quantize layers with the inputs that a basis was made of."""
    weights: list[Weight] = []
    alone = config.granularity == "tensor"  # one layer's scale
    for stack in stacks(layers, 0 if alone else STACKED):
        targets = [shifted(layer, config.shift, basis.over) for layer in stack]
        weights += _quantized(targets, basis, config, stack)
    return weights


def _quantized(targets: list[Tensor], basis: Basis, config: GptqConfig, layers: list[Layer]) -> list[Weight]:
    """Round the rows of all targets (out, in) at once; a row's codes depend on no other row."""
    target = torch.cat(targets)
    dtype = stored_scale_dtype(config, layers[0].info.dtype)
    scale, zero = _scales(target, basis, config, dtype)
    rows = [len(part) for part in targets]
    shared = config.granularity == "tensor"
    for layer, own in zip(layers, [scale] if shared else torch.split(scale, rows), strict=True):
        require_scales(own, layer.info.name)
    levels = grid_of(scale, zero, config, basis.order)
    wanted = target.t()[basis.order].contiguous()  # (in, out), in the order of rounding
    codes = round_columns(wanted.clone(), basis.coupling, levels)
    if config.refine:
        codes, levels = refine(wanted, basis.sorted, levels, codes, config.refine, scale.dtype)
        scale = levels.scale.t().to(scale.dtype).contiguous()
    unsorted = torch.empty(codes.shape[::-1], dtype=torch.int8)
    unsorted[:, basis.order] = codes.t().to(torch.int8)
    scales = [scale] if shared else torch.split(scale, rows)
    zeros = [None] * len(rows) if zero is None else [zero] if shared else torch.split(zero, rows)
    parts = zip(torch.split(unsorted, rows), scales, zeros, layers, strict=True)
    size = shared_columns(config)
    return [IntGrouped(q, s, z, config.bits, size, _input_bits(of.info, config)) for q, s, z, of in parts]


def _input_bits(info: LayerInfo, config: GptqConfig) -> int | None:
    """Bits that a layer's inputs are rounded to: rows of an embedding are looked up, and have no inputs."""
    return config.activation_bits if info.kind in ("linear", "head") else None


def outline(info: LayerInfo, config: GptqConfig) -> IntGrouped:
    """The stored weight without data."""
    return replace(integer.outline(info, config), activation_bits=_input_bits(info, config))


def describe(config: GptqConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    bits = weight.activation_bits if isinstance(weight, IntGrouped) else None
    return {**integer.describe(config, weight), **({"activations": bits} if bits else {})}


def grid_of(scale: Tensor, zero: Tensor | None, config: GptqConfig, order: Tensor) -> ColumnGrid:
    """The grid of each column in the order of rounding."""
    size = shared_columns(config) or len(order)
    offset = None if zero is None else zero.float().t().contiguous()
    return ColumnGrid(scale.float().t().contiguous(), offset, tuple((order // size).tolist()), config.bits)


def _searched(given: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds of refining, and shifted targets: worth most where few bits leave most to mend, as a search may give."""
    few = {"refine": 4, "shift": 0.5}
    known = {2: few, "auto": few, "range": few, 3: {"refine": 3, "shift": 0.4}}
    return known.get(given.get("bits", 4), {"refine": 2})


EFFORTS: dict[Level, Effort] = {
    "fast": Effort(
        "one forward pass over the calibration data, of the original model",
        lambda given: {"refine": 1 if given.get("bits", 4) in (4, 8) else 2, "shift": 0.0},
        calibration=one_pass,
    ),
    "balanced": Effort(
        "the same at 4 and 8 bits; below, where targets are shifted, three passes",
        _searched,
        calibration=lambda given: one_pass({**_searched(given), **given}),
    ),
    "best": Effort(
        "block tuning on top: 150 steps of 4 samples forward and back per block, six to twelve times balanced",
        _searched,
        {"steps": 150, "batch": 4},
    ),
}

METHOD = LayerMethod(
    name="gptq",
    command="quantize",
    summary="columns rounded in turn, errors moved into later ones; calibrated",
    when="4 bits and fewer with calibration text: the least loss at its bytes, also in stock transformers",
    config=GptqConfig,
    needs=frozenset({"gram"}),
    apply=apply,
    reading=Reads(shift=lambda config: config.shift),
    batched=Batched(batched),
    prepares=Prepares(onto),
    two_sided=TwoSided(by_both_sides),
    outline=outline,
    check=check,
    allocates=Allocates(resolve),
    widths=searched(GptqConfig, sketched),
    describe=describe,
    efforts=EFFORTS,
)
