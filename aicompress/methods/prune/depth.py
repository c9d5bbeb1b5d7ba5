"""Drop whole blocks of a stack: the network becomes shallower, and faster on any hardware.

Without data: `top`, `bottom` and `middle` name what is dropped, after Sajjad et al. 2020,
arXiv:2004.03844 (`middle` is their symmetric dropping); `even` keeps blocks as far apart as possible, the first and the
last among them, as Shleifer & Rush 2020, arXiv:2010.13002 do to start a student; `magnitude` drops the blocks of least
Σ|W| over their matrices (Kim et al. 2024, arXiv:2402.02834, eq. 1). With calibration data: `influence` drops the blocks
that change their inputs least, 1 − E cos(x_in, x_out) (ShortGPT, Men et al. 2024, arXiv:2403.03853), all at once or one
at a time with the others measured anew; `taylor` those whose weights matter least to the loss, Σ w² E[g²].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, model_validator

from aicompress.errors import RecipeError
from aicompress.methods.amount import Amount, count
from aicompress.methods.capabilities import Reads
from aicompress.methods.method import GradientLoss
from aicompress.methods.prune.units.size_targets import TARGETS, TargetedConfig
from aicompress.methods.structural import StructuralMethod, Structure, Unit


@dataclass(frozen=True)
class Blocks(Unit):
    """Whole blocks of a stack.

    Attributes:
        one_by_one: their influence is measured anew after every block that goes, without it.
    """

    plural: ClassVar[str] = "blocks"
    one_by_one: bool = False


class DepthConfig(TargetedConfig):
    """Parameters of depth. Exactly one of drop, drop_layers, keep, keep_layers and the targets."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"drop": [1]}, {"keep_layers": 2, "strategy": "top"}]})
    one_of: ClassVar[tuple[str, ...]] = ("drop", "drop_layers", "keep", "keep_layers", *TARGETS)

    name: Literal["depth"] = "depth"
    drop: tuple[int, ...] | None = Field(None, description="blocks to drop by number, from 0")
    drop_layers: int | None = Field(None, ge=0, description="how many blocks to drop")
    keep: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        exclude_if=lambda blocks: blocks is None,  # recipes from before it was there keep their digests
        description="blocks to keep by number, from 0",
    )
    keep_layers: Amount | None = Field(None, description="how many blocks to keep, or a share of them")
    strategy: Literal["even", "top", "bottom", "middle", "magnitude", "influence", "taylor"] = Field(
        "even", description="which blocks go, when only their number is given; influence and taylor need data"
    )
    one_by_one: bool = Field(False, description="measure influence anew after every block that goes, without it")
    loss: GradientLoss = Field("auto", description="for taylor: task, own (the model's predictions) or auto")

    @model_validator(mode="after")
    def _one_choice(self) -> DepthConfig:
        if self.named is not None and "strategy" in self.model_fields_set:
            which = "drop" if self.drop is not None else "keep"
            raise ValueError(f"strategy has no meaning beside {which}, which names the blocks")
        if self.one_by_one and self.strategy != "influence":
            raise ValueError("one_by_one measures influence: it needs strategy: influence")
        return self

    @property
    def named(self) -> tuple[int, ...] | None:
        """Blocks that are named, to drop or to keep; None where only their number is given."""
        return self.drop if self.drop is not None else self.keep

    @property
    def gradient_loss(self) -> GradientLoss:
        """The loss whose gradients taylor reads."""
        return self.loss

    def whole(self) -> DepthConfig:
        """The same where nothing goes."""
        return self.sized(1, 1).model_copy(update={"keep_layers": None, "drop_layers": 0})

    def sized(self, units: int, of: int) -> DepthConfig:
        """The same with so many blocks in place of the target."""
        return self.model_copy(update={**dict.fromkeys(TARGETS), "keep_layers": units})

    def probing(self) -> DepthConfig:
        """The same with blocks chosen by their place, which costs nothing."""
        return self.model_copy(update={"strategy": "even", "one_by_one": False})


def sizes(structures: Sequence[Structure], config: DepthConfig) -> list[int]:
    """How many blocks stay in each stack.

    Raises:
        RecipeError: a block that is not there, or no block left.
    """
    return [_size(stack, config) for stack in structures]


def _size(stack: Structure, config: DepthConfig) -> int:
    if config.named is not None:
        absent = [block for block in config.named if not 0 <= block < stack.size]
        if absent:
            raise RecipeError(
                f"method.{'drop' if config.drop is not None else 'keep'}: {stack.name} has no block "
                f"{', '.join(map(str, absent))}",
                f"its blocks are 0 to {stack.size - 1}",
            )
    if config.keep is not None:
        size = len(set(config.keep))
    elif config.keep_layers is not None:
        size = count(config.keep_layers, stack.size)
    else:
        gone = len(set(config.drop)) if config.drop is not None else config.drop_layers
        assert gone is not None
        size = stack.size - gone
    if not 1 <= size <= stack.size:
        raise RecipeError(f"{stack.name} has {stack.size} blocks: {size} cannot stay", "keep at least one of them")
    return size


def keep(stack: Structure, size: int, config: DepthConfig) -> list[int]:
    """Numbers of the blocks that stay, ascending."""
    count = stack.size
    if config.named is not None:
        return [block for block in range(count) if (block in config.named) == (config.drop is None)]
    if config.strategy == "top":
        return list(range(size))
    if config.strategy == "bottom":
        return list(range(count - size, count))
    if config.strategy == "middle":
        front = (size + 1) // 2
        return [*range(front), *range(count - (size - front), count)]
    if config.strategy == "even":
        return evenly_spaced(count, size)
    # The sort is stable: among equals the lower block stays.
    scores = magnitudes(stack) if config.strategy == "magnitude" else stack.importance
    assert scores is not None  # the driver measures what is read
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:size].tolist())


def evenly_spaced(count: int, size: int) -> list[int]:
    """`size` of `count` numbers as far apart as possible, both ends among them.

    >>> evenly_spaced(12, 6)
    [0, 2, 4, 7, 9, 11]
    """
    if size == 1:
        return [0]
    return [(2 * place * (count - 1) + size - 1) // (2 * (size - 1)) for place in range(size)]


def magnitudes(stack: Structure) -> torch.Tensor:
    """Σ|W| over the matrices of each block, (blocks,) float64."""
    total = torch.zeros(stack.size, dtype=torch.float64)
    for part in stack.parts:
        total[part.first] += part.power_sums(1)[0]
    return total


def statistics(config: DepthConfig) -> frozenset[str]:
    """What a config reads of calibration data."""
    return {"influence": frozenset({"influence"}), "taylor": frozenset({"gradients"})}.get(config.strategy, frozenset())


METHOD = StructuralMethod[DepthConfig](
    name="depth",
    command="prune",
    summary="drop whole blocks by number, place, weight magnitude, influence or gradient; loads everywhere",
    when="less time at any batch, in proportion to the blocks that go; drop few, or distil afterwards",
    config=DepthConfig,
    unit=lambda config: Blocks(config.one_by_one),
    sizes=sizes,
    keep=keep,
    reading=Reads(statistics),
)
