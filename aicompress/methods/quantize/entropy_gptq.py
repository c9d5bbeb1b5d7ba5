"""GPTQ with entropy-coded codes: one step for the layer, rounding that counts bits, errors moved into later columns.

Columns are rounded as gptq does it (Frantar et al. 2023, arXiv:2210.17323), without groups and scales: the step is
found so that the codes take `target_bpw` bits per weight once they are coded. Each weight takes the code of least
(w − ŵ)² / C_ii² + λ R(q), as CERWU does, and rows are scaled by least squares afterwards.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.curvature import energies, inverse_factor, permuted, raw_gram
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.quantize.grid.rated import (
    Problem,
    RatedConfig,
    bits_of_codes,
    check,
    describe,
    rated_codes,
    stored,
)
from aicompress.methods.quantize.grid.rated import outline as outline_of
from aicompress.methods.quantize.grid.refitting import refitted
from aicompress.weights import Weight


class EntropyGptqConfig(RatedConfig):
    """Parameters of entropy_gptq."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"target_bpw": 2.0, "order": "natural"}]})

    name: Literal["entropy_gptq"] = "entropy_gptq"
    order: Literal["importance", "natural"] = Field(
        "importance", description="columns with the largest inputs first, or left to right"
    )
    damping: float = Field(0.01, gt=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")


def apply(layer: Layer, config: EntropyGptqConfig) -> Weight:
    """Quantize one layer.

    Raises:
        CompressError: no calibration token reached the layer, or its Gram matrix is not one.
    """
    order, coupling, pivots, hessian = ordered(layer, config.order == "importance", config.damping)
    wanted = layer.weight.t()[order].contiguous()
    problem = Problem(wanted, coupling, pivots.pow(-2), None)
    rated = rated_codes(problem, bits_of_codes(layer.info, config, False), config)
    rows, _ = refitted(wanted, hessian, rated.values, False)
    return stored(rated, order, rows * rated.coarser * rated.steps[0], None)


def ordered(layer: Layer, by_importance: bool, damping: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What rounding takes from a layer's inputs: the order, C / diag(C) with H⁻¹ = Cᵀ C, diag(C), and H, in that order.

    Raises:
        CompressError: no calibration token reached the layer, or its Gram matrix is not one.
    """
    gram = raw_gram(layer)
    order = torch.arange(len(gram))
    if by_importance:
        order = energies(gram).argsort(descending=True, stable=True)
    factor, diagonal = inverse_factor(gram, damping, order)
    pivots = factor.diagonal().clone()
    coupling = factor.div_(pivots[:, None]).float()
    hessian = permuted(gram, order, torch.empty(gram.shape))
    hessian.diagonal().copy_(diagonal)
    return order, coupling, pivots.float(), hessian / diagonal.mean().float()


def outline(info: LayerInfo, config: EntropyGptqConfig) -> Weight:
    """The stored weight without data."""
    return outline_of(info, config, False)


METHOD = LayerMethod(
    name="entropy_gptq",
    command="quantize",
    summary="gptq with one step, rounding that counts bits, entropy-coded; calibrated",
    when="least bytes with calibration text, where the inputs of a layer are alike in size; else watersic",
    config=EntropyGptqConfig,
    needs=frozenset({"gram"}),
    apply=apply,
    outline=outline,
    check=check,
    describe=describe,
)
