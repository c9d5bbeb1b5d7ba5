"""Drop experts of a mixture, as many in every layer: the router loses their rows, and chooses among those that stay.

Pruning beats merging, which loses the router's control over what it merges (REAP, Lasby et al. 2025, arXiv:2510.13999).
`reap` is its score: what an expert's answers weigh on the tokens that are routed to it. `frequency` counts these
tokens; `norm` needs no data: Σ w² over an expert's matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.methods.capabilities import Reads
from aicompress.methods.prune.units import units
from aicompress.methods.prune.units.size_targets import TARGETS, TargetedConfig
from aicompress.methods.structural import StructuralMethod, Structure, Unit


@dataclass(frozen=True)
class Experts(Unit):
    """Experts of mixtures."""

    plural: ClassVar[str] = "experts"


class ExpertsConfig(TargetedConfig):
    """Parameters of experts. Exactly one of sparsity, keep, experts and the targets."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"sparsity": 0.5}, {"experts": 4, "score": "norm"}]})
    one_of: ClassVar[tuple[str, ...]] = ("sparsity", "keep", "experts", *TARGETS)

    name: Literal["experts"] = "experts"
    sparsity: float | None = Field(None, ge=0, lt=1, description="share of the experts to drop; rounded to drop fewer")
    keep: float | None = Field(None, gt=0, le=1, description="share of the experts to keep; rounded up")
    experts: int | None = Field(None, ge=1, description="experts of each layer afterwards")
    score: Literal["reap", "frequency", "norm"] = Field(
        "reap", description="how an expert's importance is told: reap and frequency need calibration data"
    )

    def probing(self) -> ExpertsConfig:
        """The same with the data-free score."""
        return self.model_copy(update={"score": "norm"})


def sizes(structures: Sequence[Structure], config: ExpertsConfig) -> list[int]:
    """Experts of each layer that stay.

    Raises:
        RecipeError: more than there are, fewer than a token goes to, or not as many of each of the router's groups.
    """
    return [_size(layer, config) for layer in structures]


def _size(layer: Structure, config: ExpertsConfig) -> int:
    groups = layer.groups
    if config.experts is not None:
        size = config.experts
    else:
        share = config.keep if config.keep is not None else 1 - (config.sparsity or 0.0)
        size = groups * max(1, math.ceil(round(layer.size * share / groups, 6)))
    if size > layer.size or size < layer.worth or size % groups:
        fits = [n for n in range(groups, layer.size + 1, groups) if n >= layer.worth]
        raise RecipeError(
            f"{layer.name} has {layer.size} experts, {layer.worth} for each token"
            + (f", in {groups} groups" if groups > 1 else "")
            + f": {size} cannot stay",
            f"keep {fits[0]} to {fits[-1]}" + (f", a multiple of {groups}" if groups > 1 else ""),
        )
    return size


def keep(layer: Structure, size: int, config: ExpertsConfig) -> list[int]:
    """Experts that stay, ascending: those of highest score, the earlier of equals, as many of each group."""
    if size == layer.size:
        return list(range(size))
    scores = norms(layer) if config.score == "norm" else layer.importance
    assert scores is not None  # the driver measures what is read
    return units.highest(scores, layer.groups, size)


def norms(layer: Structure) -> Tensor:
    """Σ w² over the matrices of each expert, (experts,) float64."""
    total = torch.zeros(layer.size, dtype=torch.float64)
    for part in layer.of("whole"):
        own = part.power_sums()  # (experts of this tensor,)
        total[part.first : part.first + len(own)] += own
    return total


def statistics(config: ExpertsConfig) -> frozenset[str]:
    """What a config reads of calibration data."""
    return frozenset() if config.score == "norm" else frozenset({config.score})


METHOD = StructuralMethod[ExpertsConfig](
    name="experts",
    command="prune",
    summary="drop experts of mixtures by what their answers weigh (REAP), how often they are asked, or weight norm; "
    "loads everywhere",
    when="mixtures of experts that are too large for memory; time per token stays",
    config=ExpertsConfig,
    unit=lambda config: Experts(),
    sizes=sizes,
    keep=keep,
    reading=Reads(statistics),
)
