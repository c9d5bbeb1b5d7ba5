"""How many of some things stay: a share of them, or their number."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def _checked(given: Any) -> int | float:
    """A whole number from 1, or a share between 0 and 1."""
    if (type(given) is int and given >= 1) or (type(given) is float and 0 < given < 1):
        return given
    raise ValueError("give a share between 0 and 1, or a whole number")


Amount = Annotated[int | float, BeforeValidator(_checked)]


def count(amount: int | float, of: int) -> int:
    """The number that an amount is of so many, at least one.

    >>> count(0.5, 30), count(6, 30)
    (15, 6)
    """
    return amount if isinstance(amount, int) else max(1, round(amount * of))
