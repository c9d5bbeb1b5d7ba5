"""Layers that hold nearly the same matrix share it: W_j becomes W_i, stored once; data-free.

Two layers are alike where ‖W_i − W_j‖_F ≤ threshold ‖W_i‖_F, of layers of one kind, shape, dtype and stored form; one
is never the transpose of the other. Each is compared with the first one of every group before it, so that none is
further from what it becomes than the threshold; `value: mean` puts the mean of the group there instead, which halves
the error of a pair. The threshold is 0 by default: matrices that are equal number for number, as checkpoints hold
them whose architecture ties them or that were grown by copying blocks, are merged for nothing. Layers that were
trained apart differ by about their own size.

Lan et al. 2019, "ALBERT", arXiv:1909.11942, is the end of that road: one set of weights for all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate, RowWise
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.methods.shares import Shares
from aicompress.weights import Dense, Tied, Weight

SAMPLE = 4096  # numbers of a matrix that are compared before all of it is


class TieConfig(MethodConfig):
    """Parameters of tie."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}, {"threshold": 0.05, "value": "mean"}]})

    name: Literal["tie"] = "tie"
    threshold: float = Field(0.0, ge=0, lt=1, description="largest ‖W1 − W2‖ / ‖W1‖ of layers that become one")
    value: Literal["first", "mean"] = Field("first", description="what they become: the first one, or their mean")


@dataclass(frozen=True)
class _Leader:
    """The first layer of a group, with some of its numbers.

    Attributes:
        candidate: the layer.
        sample: numbers at equal distances, (≤ SAMPLE,) float64: they differ by no more than the whole matrices do.
        norm: ‖W‖.
        members: the numbers of the group's layers.
    """

    candidate: Candidate[TieConfig]
    sample: Tensor
    norm: float
    members: list[int]


def groups(candidates: Sequence[Candidate[TieConfig]]) -> list[list[int]]:
    """Layers that are alike; each is read once, and again with those whose samples come close, a few rows at a time."""
    leaders: dict[tuple[object, ...], list[_Leader]] = {}
    for number, candidate in enumerate(candidates):
        info = candidate.info
        form = () if info.outline is None else (info.stored, *sorted(info.outline.specs().items()))
        key = (info.kind, info.tensor_shape, info.dtype, info.transposed, form, candidate.config)
        likely = leaders.setdefault(key, [])
        sample, norm = _sampled(candidate)
        leader = next((each for each in likely if _alike(each, candidate, sample)), None)
        if leader is None:
            likely.append(_Leader(candidate, sample, norm, [number]))
        else:
            leader.members.append(number)
    return [leader.members for likely in leaders.values() for leader in likely if len(leader.members) > 1]


def _sampled(candidate: Candidate[TieConfig]) -> tuple[Tensor, float]:
    """Numbers at equal distances, and ‖W‖."""
    numbers = math.prod(candidate.info.shape)
    every = max(1, -(-numbers // SAMPLE))
    sample, squares, first = torch.empty(-(-numbers // every), dtype=torch.float64), 0.0, 0
    for read in candidate.parts:
        flat = read().weight.reshape(-1)
        taken = flat[-first % every :: every]
        sample[-(-first // every) :][: len(taken)] = taken  # no piece is left of it between large blocks of memory
        squares += _norm(flat) ** 2
        first += len(flat)
    return sample, math.sqrt(squares)


def _alike(leader: _Leader, candidate: Candidate[TieConfig], sample: Tensor) -> bool:
    most = leader.candidate.config.threshold * leader.norm
    if float((leader.sample - sample).norm()) > most:
        return False
    apart = 0.0
    for ours, theirs in zip(leader.candidate.parts, candidate.parts, strict=True):
        apart += _norm(ours().weight - theirs().weight) ** 2
        if math.sqrt(apart) > most:
            return False
    return True


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def outlines(infos: Sequence[LayerInfo], config: TieConfig) -> list[Weight]:
    """The stored weights without data."""
    source = outline(infos[0], config)
    return [source, *(Tied.of(source, info.tensor_shape, info.transposed) for info in infos[1:])]


def compress(layers: Sequence[Layer], config: TieConfig) -> list[Weight]:
    """One matrix in its form, and its name for the other layers."""
    source = unchanged(layers[0], config)
    if config.value == "mean" and len(layers) > 1:
        source = Dense(torch.stack([layer.weight for layer in layers]).mean(0).to(layers[0].info.dtype))
    return [source, *(Tied.of(source, layer.info.tensor_shape, layer.info.transposed) for layer in layers[1:])]


def unchanged(layer: Layer, config: TieConfig) -> Weight:
    """A layer that is like no other."""
    return layer.stored or Dense(layer.weight.to(layer.info.dtype))


def outline(info: LayerInfo, config: TieConfig) -> Weight:
    """The same without data."""
    return info.outline or Dense.outline(info.shape, info.dtype)


def check(info: LayerInfo, config: TieConfig) -> tuple[str, str] | None:
    """Codes have no mean."""
    if config.value == "first" or info.stored == Dense.form:
        return None
    return f"{info.name}: is stored as {info.stored}, which has no mean with another", "value: first, or exclude it"


METHOD = LayerMethod(
    name="tie",
    command="factorize",
    summary="layers that hold the same matrix, or nearly the same, store it once; by threshold; data-free",
    when="checkpoints grown by copying blocks, or trained with ties that were saved apart; others have no like layers",
    config=TieConfig,
    apply=unchanged,
    outline=outline,
    check=check,
    shares=Shares(
        "",
        groups,
        outlines,
        compress,
        "as no other selected layer of their shape and form is within the threshold (transposes are not tied)",
        alone=False,
        row_wise=True,
    ),
    row_wise=RowWise(lambda config: True),
    suits=lambda info: not info.part,  # a part has no place of its own that another parameter could name
    made_for="layers that are stored as one matrix, and not as several",
)
