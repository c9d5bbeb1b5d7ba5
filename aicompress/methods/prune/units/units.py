"""Units inside layers, neurons or heads: scores that decide which stay, and new values for what reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.methods.method import GradientLoss
from aicompress.methods.prune.units import obs
from aicompress.methods.prune.units.size_targets import TargetedConfig
from aicompress.methods.structural import Structure

Score = Literal["product", "sum", "activation", "taylor", "obs"]


class UnitsConfig(TargetedConfig):
    """How units are scored, and whether their consumers are refitted."""

    score: Score = Field(
        "product",
        description="how a unit's importance is told: product or sum of its weights' norms (data-free), its mean "
        "activation, taylor: what the loss changes without its weights, or obs: what its removal costs in the "
        "consumer's output once the others have taken over",
    )
    refit: bool | None = Field(
        None, description="give the consumers of what stays their least-squares values; by default with score obs"
    )
    loss: GradientLoss = Field(
        "auto", description="for taylor: of the labels (task), of the model's own predictions (own), or what there is"
    )
    damping: float = Field(0.001, gt=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")
    shift: float = Field(
        0.0, ge=0, le=1, description="how far the target moves to make up for what was pruned in layers before"
    )

    @property
    def refits(self) -> bool:
        """Whether consumers are refitted."""
        return self.score == "obs" if self.refit is None else self.refit

    @property
    def gradient_loss(self) -> GradientLoss:
        """The loss whose gradients taylor reads."""
        return self.loss

    @model_validator(mode="after")
    def _shift_refits(self) -> UnitsConfig:
        if self.shift and not self.refits:
            raise ValueError("shift has no meaning without refit")
        return self


def statistics(config: UnitsConfig) -> frozenset[str]:
    """Statistics that a config reads."""
    gram = {"gram", "mean"} if config.refits or config.score == "obs" else set()
    scores = {"activation": {"mean_abs"}, "taylor": {"gradients"}}
    return frozenset(gram | scores.get(config.score, set()))


def shift(config: UnitsConfig) -> float:
    """How far targets move to make up for what compressed layers before them changed."""
    return config.shift


def refits(config: UnitsConfig) -> bool:
    """Whether consumers are refitted."""
    return config.refits


def keep(structure: Structure, size: int, config: UnitsConfig) -> list[int]:
    """Units that stay, ascending: those of highest score, the earlier of equals, as many of each group."""
    if size == structure.size:
        return list(range(size))
    if config.score == "obs":
        read = obs.consumers(structure, config.damping, config.shift)
        return obs.chosen(structure, read, size)
    return highest(scores(structure, config.score), structure.groups, size)


def highest(values: Tensor, groups: int, size: int) -> list[int]:
    """Units of highest score, ascending: as many of each group, the earlier of equals.

    Args:
        values: score of each unit, (units,).
        groups: runs of equal length in which the units lie.
        size: how many units stay.
    """
    run, count = len(values) // groups, size // groups
    order = torch.argsort(values.view(groups, run), dim=1, descending=True, stable=True)[:, :count]
    return sorted((torch.arange(groups)[:, None] * run + order).reshape(-1).tolist())


def refit(structure: Structure, kept: Sequence[int], config: UnitsConfig) -> Mapping[str, Tensor]:
    """New values of the consumers and their biases, by tensor."""
    if not config.refits or len(kept) == structure.size:
        return {}
    read = obs.consumers(structure, config.damping, config.shift)
    return {name: value for consumer in read for name, value in consumer.refitted(kept).items()}


def scores(structure: Structure, how: Score) -> Tensor:
    """Importance of each unit, (units,) float64; for obs see `obs`."""
    if how == "activation":
        return activations(structure)
    if how == "taylor":
        assert structure.importance is not None  # the driver adds it up where gradients are read
        return structure.importance
    squares: dict[str, Tensor] = {}  # by module: a weight and its bias make one vector per unit
    for part in structure.parts:
        if part.role == "offset":
            continue
        total = part.power_sums()  # (units,)
        squares[part.module] = squares[part.module] + total if part.module in squares else total
    stacked = torch.stack(list(squares.values()))  # (modules, units)
    return stacked.sum(dim=0) if how == "sum" else stacked.sqrt().prod(dim=0)


def losses(structure: Structure, sizes: Sequence[int], config: UnitsConfig) -> list[float]:
    """What is lost when so many units stay, for descending sizes: of the score that the config names."""
    if config.score == "obs":
        return obs.curve(structure, obs.consumers(structure, config.damping), sizes)
    return curve(structure, sizes, config.score)


def curve(structure: Structure, sizes: Sequence[int], how: Score) -> list[float]:
    """What is lost when so many units stay, those of highest score, for any sizes; for obs see `obs.curve`.

    taylor is a change of the loss, which compares between structures as it is. For activation it is what the units give
    the consumers' outputs, which all add up in one stream (see `outputs`). Norms are divided by their structure's mean,
    as DepGraph's are for one threshold over all layers (arXiv:2301.12900, section 3.3).
    """
    importance = scores(structure, how)
    going = torch.argsort(importance, descending=True, stable=True).flip(0)
    if how == "activation":
        worth = outputs(structure)
    else:
        relative = how != "taylor" and float(importance.mean()) > 0
        worth = importance / importance.mean() if relative else importance
    lost = torch.cat([worth.new_zeros(1), worth[going].cumsum(0)])  # by how many go
    return [float(lost[structure.size - size]) for size in sizes]


def outputs(structure: Structure) -> Tensor:
    """Square of what each unit gives the consumers' outputs, mean |x| times its weights' norm, (units,) float64."""
    total = torch.zeros(structure.size, dtype=torch.float64)
    for part in structure.of("consumer"):
        mean = structure.inputs[part.tensor].mean_abs
        assert mean is not None  # as for `activations`
        rows = part.read().double().reshape(structure.size, part.span, -1)  # (units, span, out)
        total += (rows.square().sum(dim=2) * mean.double().reshape(structure.size, part.span).square()).sum(dim=1)
    return total


def activations(structure: Structure) -> Tensor:
    """Mean of |x| over a unit's entries of the consumers' inputs, (units,) float64.

    Raises:
        CompressError: there are no statistics.
    """
    total = torch.zeros(structure.size, dtype=torch.float64)
    for part in structure.of("consumer"):
        inputs = structure.inputs.get(part.tensor)
        if inputs is None or inputs.mean_abs is None:
            raise CompressError(f"{part.tensor}: there are no means of its inputs", "calibrate with mean_abs")
        total += inputs.mean_abs.double().reshape(structure.size, part.span).mean(dim=1)
    return total


def rounded(size: int, share: float, multiple: int) -> int:
    """How many of `size` units a share is, at least one, rounded up to a multiple."""
    # 0.8 * 100 is a little above 80 in floating point.
    wanted = max(1, math.ceil(round(size * share, 6)))
    return min(size, math.ceil(wanted / multiple) * multiple)
