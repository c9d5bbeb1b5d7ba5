"""Two layers of an attention of which only products of heads count: what is known of them, for methods and drivers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class HeadProduct:
    """Two layers whose heads are multiplied with each other: output with value, or query with key.

    Any invertible matrix may stand between the rows of a value's head and the output's columns for it, and between
    queries and keys that nothing turns in between.

    Attributes:
        kind: values: a value and an output projection; scores: a query and a key projection.
        members: parameters of these two, in this order.
        biases: parameters that are added to what the members give; empty where there is none.
        heads: of queries.
        groups: of keys and values; query head h reads group h // (heads / groups).
        width: rows of a head.
        units: rows of a head that stay or go together, such as pairs that a rotary embedding turns; empty: any
            directions of a head may stay.
    """

    kind: Literal["values", "scores"]
    members: tuple[str, str]
    biases: tuple[str, str]
    heads: int
    groups: int
    width: int
    units: tuple[tuple[int, ...], ...] = ()
