"""Drop channels of convolutions and neurons of linear layers, with all that depends on them: a smaller dense network.

A group of channels that only go together (through norms, residual sums, concatenations, depthwise convolutions) is
scored unit by unit:
    l1, l2      sum over its layers of the norm of the unit's rows or columns, each layer's scaled to a mean of 1
                (Li et al. 2017, arXiv:1608.08710, for one layer; DepGraph, Fang et al. 2023, arXiv:2301.12900, eq. 4)
    activation  mean |x| of what the next layers read, times the norm of the columns that read it (Wanda, Sun et al.
                2024, arXiv:2306.11695, eq. 1, for columns)
    taylor      mean over samples of (Σ x ∂L/∂x)²: the loss without the unit, to first order (Molchanov et al. 2019,
                arXiv:1906.10771, eq. 8)
Afterwards the layers that lost inputs are fitted to what they gave, and batch norms are estimated anew, where there is
calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import ByteSize, ConfigDict, Field
from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.methods.channels import ChannelMethod, Channels, ChannelSettings, KeptUnits, Limits, SaliencyKind
from aicompress.methods.method import MethodConfig
from aicompress.methods.structural import Part


class ChannelsConfig(MethodConfig):
    """Parameters of channels. Exactly one of sparsity, keep and the targets."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"sparsity": 0.5}, {"keep": 0.5, "score": "taylor", "scope": "global"}]}
    )
    one_of: ClassVar[tuple[str, ...]] = ("sparsity", "keep", "target_parameters", "target_bytes", "target_latency")

    name: Literal["channels"] = "channels"
    sparsity: float | None = Field(None, ge=0, lt=1, description="share of the channels to drop")
    keep: float | None = Field(None, gt=0, le=1, description="share of the channels to keep")
    target_parameters: int | None = Field(None, ge=1, description="numbers that the output may hold, buffers included")
    target_bytes: ByteSize | None = Field(None, gt=0, description="bytes of the output's weight files, e.g. 200KB")
    target_latency: float | None = Field(
        None, gt=0, le=1, description="forward time afterwards, at most, as a part of the input's; measured here"
    )
    scope: Literal["layer", "global"] = Field(
        "layer", description="layer: the same share of every group; global: the lowest scores of the whole network"
    )
    score: Literal["l1", "l2", "activation", "taylor"] = Field(
        "l2", description="how a channel is judged; activation and taylor read calibration data"
    )
    multiple: int = Field(1, ge=1, description="round the channels of a group up to a multiple of this")
    floor: float = Field(0.1, ge=0, le=1, description="scope global: share of every group that stays at least")
    refit: bool | None = Field(
        None, description="fit the layers that lost inputs to what they gave; by default where there is data"
    )
    recalibrate_norms: bool | None = Field(
        None, description="estimate the statistics of batch norms anew; by default where there is data"
    )
    damp: float = Field(0.01, gt=0, description="ridge of the fit, as a share of the mean squared input")
    input_shape: tuple[int, ...] | None = Field(
        None, description="shape of one input without the batch, e.g. [1, 28, 28], where nothing else tells it"
    )


def settings(config: ChannelsConfig) -> ChannelSettings:
    """What a config asks of the driver."""
    saliency: SaliencyKind | None = config.score if config.score in ("activation", "taylor") else None
    data_fields = ["score"] if saliency else []
    data_fields += [name for name in ("refit", "recalibrate_norms") if getattr(config, name)]
    equal = config.scope == "layer" and (config.keep is not None or config.sparsity is not None)
    return ChannelSettings(
        saliency,
        _share(config) if equal else None,
        config.scope == "global",
        config.multiple,
        Limits(config.target_parameters, config.target_bytes, config.target_latency),
        config.refit,
        config.recalibrate_norms,
        config.damp,
        config.input_shape,
        tuple(f"{name}: {getattr(config, name)}" for name in data_fields),
    )


def choose(groups: Sequence[Channels], config: ChannelsConfig, fits: Callable[[KeptUnits], bool]) -> KeptUnits:
    """Units that stay, ascending: those of highest score, the earlier of equals.

    Raises:
        RecipeError: the target cannot be met by removing channels.
    """
    orders = [_Order(group, scores(group, config), config) for group in groups]
    if config.sparsity is not None or config.keep is not None:
        return _kept(orders, config, _share(config))
    # The least that is dropped so that the rest fits; the share of a choice only falls with the share asked for.
    low, high = 0, sum(len(order.steps) for order in orders) if config.scope == "global" else _GRID
    total = max(1, high)
    if not fits(_kept(orders, config, 1 - high / total)):
        raise RecipeError(
            "the target is below what the network weighs, or takes, with one channel left of every group",
            "choose a larger target" if config.scope == "layer" else "choose a larger target, or a smaller floor",
        )
    while low < high:
        middle = (low + high) // 2
        if fits(_kept(orders, config, 1 - middle / total)):
            high = middle
        else:
            low = middle + 1
    return _kept(orders, config, 1 - low / total)


def choose_sized(group: Channels, size: int, config: ChannelsConfig) -> list[int]:
    """Units of one group that stay where their number is given."""
    share = {"keep": size / group.structure.size, "sparsity": None, "multiple": 1}
    return choose([group], config.model_copy(update=share), lambda choice: True)[0]


_GRID = 4096  # shares that a target of scope "layer" is searched among


def _share(config: ChannelsConfig) -> float:
    return config.keep if config.keep is not None else 1 - (config.sparsity or 0.0)


class _Order:
    """The units of a group in the order in which they go: a step takes one unit of every cohort."""

    def __init__(self, group: Channels, values: Tensor, config: ChannelsConfig) -> None:
        cohorts = max(group.cohorts) + 1
        ranked: list[list[int]] = [[] for _ in range(cohorts)]
        for unit in sorted(range(group.structure.size), key=lambda unit: (float(values[unit]), -unit)):
            ranked[group.cohorts[unit]].append(unit)
        self.size = group.structure.size
        self.steps = list(zip(*ranked, strict=True))  # lowest first; the last one never goes
        self.values = [sum(float(values[unit]) for unit in step) / cohorts for step in self.steps]
        self.multiple = config.multiple

    def kept(self, steps: int) -> list[int]:
        """Units that stay when at least so many steps of units must."""
        steps = min(len(self.steps), max(1, steps))
        while steps < len(self.steps) and steps * len(self.steps[0]) % self.multiple:
            steps += 1
        return sorted(unit for step in self.steps[len(self.steps) - steps :] for unit in step)


def _kept(orders: Sequence[_Order], config: ChannelsConfig, share: float) -> KeptUnits:
    """The choice for a share of channels that stays."""
    if config.scope == "layer":  # 0.8 * 100 is a little above 80 in floating point
        return [order.kept(math.ceil(round(len(order.steps) * share, 6))) for order in orders]
    least = [max(1, math.ceil(round(len(order.steps) * config.floor, 6))) for order in orders]
    ranked = sorted(
        (value, number, step)
        for number, order in enumerate(orders)
        for step, value in enumerate(order.values[: len(order.steps) - least[number]])
    )
    goes = math.floor(round(sum(order.size for order in orders) * (1 - share), 6))
    steps = [len(order.steps) for order in orders]
    for _, number, _ in ranked:
        taken = orders[number].size // len(orders[number].steps)
        if taken > goes:
            continue
        steps[number] -= 1
        goes -= taken
    return [order.kept(count) for order, count in zip(orders, steps, strict=True)]


def scores(group: Channels, config: ChannelsConfig) -> Tensor:
    """Importance of each unit, (units,) float64; comparable across groups."""
    if config.score == "taylor":
        assert group.saliency is not None
        return group.saliency.double()
    if config.score == "activation":
        assert group.saliency is not None
        readers = [part for part in group.structure.parts if part.role == "consumer"]
        return _scaled(group.saliency.double()) * _norms(readers, 2)
    return _norms(group.structure.parts, 1 if config.score == "l1" else 2)


def _norms(parts: Sequence[Part], order: int) -> Tensor:
    """Sum over layers of the norm of each unit's numbers, (units,); a layer's mean is 1."""
    powers: dict[tuple[str, str], Tensor] = {}  # a weight and its bias make one vector per unit
    for part in parts:
        total = part.power_sums(order)  # (units,)
        key = (part.module, part.role)
        powers[key] = powers[key] + total if key in powers else total
    return torch.stack([_scaled(total.pow(1 / order)) for total in powers.values()]).sum(dim=0)


def _scaled(values: Tensor) -> Tensor:
    mean = values.mean()
    return values / mean if float(mean) > 0 else values


METHOD = ChannelMethod[ChannelsConfig](
    name="channels",
    command="prune",
    summary="drop channels and neurons of any network through its dependency graph, by weight or by gradient",
    when="convolutional and other plain networks, faster anywhere; transformers have width, heads and depth",
    config=ChannelsConfig,
    settings=settings,
    choose=choose,
    choose_sized=choose_sized,
)
