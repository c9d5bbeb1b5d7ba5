"""Which layers of neighbouring blocks are alike, for methods that give them a part in common."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from pydantic import Field

from aicompress.methods.capabilities import Candidate
from aicompress.methods.factorize.budget.shared import SharedConfig

APART = "as no like layer of a neighbouring block is selected"
_DEPTH = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


class BlocksConfig(SharedConfig):
    """Parameters of methods in which layers of several blocks share."""

    blocks: int = Field(2, ge=1, description="how many neighbouring blocks share; levels can give each its own")


B = TypeVar("B", bound=BlocksConfig)


def neighbours(candidates: Sequence[Candidate[B]]) -> list[list[int]]:
    """Linear layers that have one name but for their depth, one shape and one dtype, by contiguous blocks."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for number, candidate in enumerate(candidates):
        info = candidate.info
        if info.kind == "linear" and info.index is not None:
            key = (_DEPTH.sub("#", info.name, count=1), info.shape, info.dtype, candidate.config)
            alike.setdefault(key, []).append(number)
    found: list[list[int]] = []
    for numbers in alike.values():
        numbers.sort(key=lambda number: candidates[number].info.index or 0)
        size = candidates[numbers[0]].config.blocks
        found += [sorted(numbers[start : start + size]) for start in range(0, len(numbers), size)]
    return [group for group in found if len(group) > 1]
