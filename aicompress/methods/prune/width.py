"""Drop neurons of feed-forward layers, as many in every layer: the result is a plain, narrower model.

A neuron is one row of each producer (gate, up or fc1, with its bias) and one column of each consumer (down or fc2). Its
score is made of the L2 norms of these slices (Li et al. 2017, arXiv:1608.08710, for filters). `product` multiplies
them: scaling a producer and unscaling its consumer leaves both the function and the score as they are. `sum` adds
their squares, the group norm of DepGraph (Fang et al. 2023, arXiv:2301.12900, eq. 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.methods.registry import StructuralConfig, StructuralMethod, Structure


class WidthConfig(StructuralConfig):
    """Parameters of width. Exactly one of sparsity, keep and intermediate_size."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"sparsity": 0.5}, {"keep": 0.75, "score": "sum"}]})
    one_of: ClassVar[tuple[str, ...]] = ("sparsity", "keep", "intermediate_size")

    name: Literal["width"] = "width"
    sparsity: float | None = Field(None, ge=0, lt=1, description="share of the neurons to drop")
    keep: float | None = Field(None, gt=0, le=1, description="share of the neurons to keep")
    intermediate_size: int | None = Field(None, ge=1, description="neurons of each feed-forward layer afterwards")
    multiple: int = Field(
        8, ge=1, description="round the width up to a multiple of this, which kernels like; not for intermediate_size"
    )
    score: Literal["product", "sum"] = Field("product", description="how a neuron's norms are put together")


def sizes(structures: Sequence[Structure], config: WidthConfig) -> list[int]:
    """Width of each feed-forward layer afterwards.

    Raises:
        RecipeError: wider than it is.
    """
    return [_size(layer, config) for layer in structures]


def _size(layer: Structure, config: WidthConfig) -> int:
    if config.intermediate_size is not None:
        if config.intermediate_size > layer.size:
            raise RecipeError(
                f"method.intermediate_size is {config.intermediate_size}, but {layer.name} has {layer.size} neurons",
                "choose a smaller one",
            )
        return config.intermediate_size
    share = config.keep if config.keep is not None else 1 - (config.sparsity or 0.0)
    # 0.8 * 100 is a little above 80 in floating point.
    wanted = max(1, math.ceil(round(layer.size * share, 6)))
    return min(layer.size, math.ceil(wanted / config.multiple) * config.multiple)


def keep(layer: Structure, size: int, config: WidthConfig) -> list[int]:
    """Neurons that stay, ascending: those of highest score, the earlier of equals."""
    if size == layer.size:
        return list(range(size))
    order = torch.argsort(scores(layer, config.score), descending=True, stable=True)
    return sorted(order[:size].tolist())


def scores(layer: Structure, how: Literal["product", "sum"]) -> Tensor:
    """Importance of each neuron, (neurons,) float64."""
    squares: dict[str, Tensor] = {}  # by module: a weight and its bias make one vector per neuron
    for part in layer.parts:
        total = part.read().double().square().sum(dim=1)  # (neurons,)
        squares[part.module] = squares[part.module] + total if part.module in squares else total
    stacked = torch.stack(list(squares.values()))  # (modules, neurons)
    return stacked.sum(dim=0) if how == "sum" else stacked.sqrt().prod(dim=0)


METHOD = StructuralMethod(
    name="width",
    command="prune",
    summary="drop feed-forward neurons by weight norm, as many in every layer; loads everywhere; data-free",
    config=WidthConfig,
    units="neurons",
    sizes=sizes,
    keep=keep,
)
