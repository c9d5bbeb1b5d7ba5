"""How large the factor is that layers share: what a recipe says of it, in ranks and in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from aicompress.errors import RecipeError
from aicompress.layer import LayerInfo
from aicompress.methods.factorize.budget.sizes import RankConfig, factor_dtype
from aicompress.methods.method import MethodConfig


class SharedConfig(MethodConfig):
    """Parameters of methods whose layers share a factor."""

    one_of: ClassVar[tuple[str, ...]] = ("rank", "keep")

    rank: int | None = Field(None, ge=1, description="rows of V; layers that it would not shrink stay dense")
    keep: float | None = Field(
        None, gt=0, le=1, description="share of the parameters of the layers together that their factors have"
    )
    multiple: int | None = Field(
        1, ge=1, description="ranks are multiples of this, so that groups of a later quantization fit"
    )
    whiten: bool = Field(True, description="columns count by the Gram matrix of the inputs; false: data-free")
    relative: bool = Field(
        True, description="a layer's error counts as a part of its output; false: large outputs count more"
    )
    damping: float = Field(0.1, ge=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")


class SharedRankConfig(SharedConfig, RankConfig):
    """Parameters of methods whose layers share one factor: how large it is may be left to the singular values."""

    one_of: ClassVar[tuple[str, ...]] = RankConfig.one_of


def numbers_of(infos: Sequence[LayerInfo]) -> tuple[int, int]:
    """Rows of all layers together, and their columns."""
    return sum(info.shape[0] for info in infos), infos[0].shape[1]


def rank_of(infos: Sequence[LayerInfo], config: SharedConfig) -> int:
    """The rank that layers have together."""
    (out, columns), multiple = numbers_of(infos), config.multiple or 1
    if config.rank is not None:
        return -(-config.rank // multiple) * multiple
    if config.keep is None:
        raise RecipeError(f"{infos[0].name}: its rank is not decided", "give rank or keep")
    rank = int(config.keep * out * columns / (out + columns))
    return max(multiple, rank // multiple * multiple)


def shrinks(infos: Sequence[LayerInfo], rank: int) -> bool:
    """Whether factors of this rank are smaller than the layers."""
    out, columns = numbers_of(infos)
    dense = out * columns * infos[0].dtype.itemsize
    return rank * (out + columns) * factor_dtype(infos[0]).itemsize < dense
