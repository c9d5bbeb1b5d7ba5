"""Group tensor names by layer: those of one layer have the same numbers in them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol, TypeVar


class UnitTensor(Protocol):
    """A tensor that produces or consumes units."""

    @property
    def tensor(self) -> str: ...

    @property
    def role(self) -> str: ...


S = TypeVar("S", bound=UnitTensor)


def grouped(shares: Sequence[S]) -> dict[str, list[S]]:
    """Shares by feed-forward layer or attention: by all the numbers in their names, else by the first one alone."""
    for pattern in (re.compile(r".*\.\d+(?=\.)"), re.compile(r".*?\.\d+(?=\.)")):
        groups: dict[str, list[S]] = defaultdict(list)
        for share in shares:
            place = pattern.match(share.tensor)
            groups[place[0] if place else ""].append(share)
        if all({s.role for s in group} == {"producer", "consumer"} for group in groups.values()):
            break
    return dict(groups)


def by_reader(shares: Sequence[S]) -> list[tuple[str, list[S]]]:
    """Shares of attentions by block: where a block has several, each consumer with the producers whose path is nearest.

    Returns:
        The block's name with the shares of one attention.
    """
    attentions: list[tuple[str, list[S]]] = []
    for name, group in grouped(shares).items():
        readers = [share for share in group if share.role == "consumer"]
        if len(readers) < 2:
            attentions.append((name, group))
            continue
        mine: dict[str, list[S]] = {reader.tensor: [] for reader in readers}
        for share in group:
            mine[max(mine, key=lambda reader: _shared(reader, share.tensor))].append(share)
        attentions += [(name, each) for each in mine.values()]
    return attentions


def _shared(one: str, other: str) -> int:
    """How many pieces two names begin with in common."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), len(one))
