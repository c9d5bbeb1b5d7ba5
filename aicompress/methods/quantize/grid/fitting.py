"""Sizes of groups: what may be given, and what fits a layer's width where nothing is."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator

from aicompress.methods.method import MethodConfig

LEAST = 16  # columns in a group that is chosen here: smaller ones spend more on scales than they gain

C = TypeVar("C", bound=MethodConfig)


def _counted(given: Any) -> Any:
    """Refuse what other tools write for a scale for each row."""
    if isinstance(given, int) and given == -1:
        raise ValueError("one scale for a whole row is `granularity: channel`")
    return given


GroupSize = Annotated[int, BeforeValidator(_counted)]


def with_fitting_groups(config: C, columns: int, given: bool) -> C:
    """The config with groups that fit so many columns, where the recipe gives no size.

    The largest divisor that is not above the default, of multiples of 8 where there are any; for a narrow layer one
    scale for a row; else a last group that is narrower, or one scale for a row where the method has no such groups.

    Args:
        config: has granularity and group_size.
        columns: input columns of the layer.
        given: the recipe says how many columns share a scale.
    """
    fields: Any = config
    if given or fields.granularity != "group" or columns % fields.group_size == 0:
        return config
    if getattr(config, "pad", False):
        return config
    divisors = [size for size in range(LEAST, min(fields.group_size, columns - 1) + 1) if columns % size == 0]
    if divisors:
        best = max([size for size in divisors if size % 8 == 0] or divisors)
        return config.model_copy(update={"group_size": best})
    narrow = columns < 2 * fields.group_size or "pad" not in type(config).model_fields
    return config.model_copy(update={"granularity": "channel"} if narrow else {"pad": True})
