"""Drop attention heads, as many in every layer: the result is a plain model of fewer heads of the same size.

A key-value group goes with all query heads that read it (`unit: group`), or as many query heads go from every group
(`unit: query`), whose keys and values stay. Scores and the refit of the output projection are those of feed-forward
neurons (see `width`), a head's columns taken together: structured OBS over whole heads is ZipLM's (Kurtic et al. 2023,
arXiv:2302.04089).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from aicompress.errors import RecipeError
from aicompress.methods.capabilities import Reads
from aicompress.methods.prune.units import units
from aicompress.methods.prune.units.size_targets import TARGETS
from aicompress.methods.structural import Refits, StructuralMethod, Structure, Unit


@dataclass(frozen=True)
class Heads(Unit):
    """Heads of attentions.

    Attributes:
        grouped: a unit is a key-value group with all its query heads; otherwise one query head.
    """

    plural: ClassVar[str] = "heads"
    grouped: bool = True


class HeadsConfig(units.UnitsConfig):
    """Parameters of heads. Exactly one of sparsity, keep, heads and the targets."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"sparsity": 0.5}, {"heads": 4, "score": "sum"}]})
    one_of: ClassVar[tuple[str, ...]] = ("sparsity", "keep", "heads", *TARGETS)

    name: Literal["heads"] = "heads"
    sparsity: float | None = Field(None, ge=0, lt=1, description="share of the heads to drop; rounded to drop fewer")
    keep: float | None = Field(None, gt=0, le=1, description="share of the heads to keep; rounded up")
    heads: int | None = Field(None, ge=1, description="query heads of each attention afterwards")
    unit: Literal["group", "query"] = Field(
        "group",
        description="what goes: key-value groups with all their query heads, or query heads, as many of every group",
    )


def sizes(structures: Sequence[Structure], config: HeadsConfig) -> list[int]:
    """Units of each attention that stay: groups, or query heads.

    Raises:
        RecipeError: not as many can stay.
    """
    return [_size(attention, config) for attention in structures]


def _size(attention: Structure, config: HeadsConfig) -> int:
    each = attention.groups  # query heads go from every group, so their number is a multiple
    if config.heads is not None:
        size, rest = divmod(config.heads, attention.worth)
        if rest or not each <= size <= attention.size or size % each:
            allowed = [n * attention.worth for n in range(each, attention.size + 1, each)]
            raise RecipeError(
                f"method.heads is {config.heads}, but {attention.name} can keep {', '.join(map(str, allowed))} heads",
                "choose one of these",
            )
        return size
    share = config.keep if config.keep is not None else 1 - (config.sparsity or 0.0)
    return each * max(1, math.ceil(round(attention.size * share / each, 6)))


METHOD = StructuralMethod[HeadsConfig](
    name="heads",
    command="prune",
    summary="drop attention heads by weight norm, activation or structured OBS, as many in every layer; loads "
    "everywhere",
    when="long sequences, where attention and its cache cost most; combine it with width",
    config=HeadsConfig,
    unit=lambda config: Heads(config.unit == "group"),
    sizes=sizes,
    keep=units.keep,
    reading=Reads(units.statistics, units.shift),
    refits=Refits(units.refits, units.refit),
)
