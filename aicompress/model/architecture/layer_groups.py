"""Group tensor names by layer: those of one layer have the same numbers in them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol, TypeVar


class Share(Protocol):
    """A tensor that produces or consumes units."""

    @property
    def tensor(self) -> str: ...

    @property
    def role(self) -> str: ...


S = TypeVar("S", bound=Share)


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
