"""Dataclasses to and from what JSON holds, each value checked against its field's type."""

from __future__ import annotations

import dataclasses
import math
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def build(kind: type, fields: dict[str, Any]) -> Any:
    """A dataclass from JSON, and those inside it, derived figures dropped.

    Raises:
        TypeError: a field is missing, or of another type.
    """
    kinds = get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    given = {key: _made(value, kinds[key]) for key, value in fields.items() if key in known}
    wrong = next((key for key, value in given.items() if not _fits(value, kinds[key])), None)
    if wrong is not None:
        raise TypeError(f"{wrong} is {type(given[wrong]).__name__}")
    return kind(**given)


def _made(value: Any, kind: Any) -> Any:
    """What JSON holds as a field's type has it: lists as tuples, mappings as dataclasses."""
    inner = get_args(kind)
    if isinstance(value, list) and get_origin(kind) is tuple:
        return tuple(_made(each, inner[0]) for each in value)
    named: Any = next(filter(dataclasses.is_dataclass, (kind, *inner)), None) if isinstance(value, dict) else None
    return value if named is None else build(named, value)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type; a number that was not finite has become null."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (UnionType, Union):
        return any(_fits(value, each) for each in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, inner[1]) for each in value.values())
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, inner[0]) for each in value)
    if kind is float:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def strict(plain: Any) -> Any:
    """The same with None for nan and infinity, which JSON cannot hold."""
    if isinstance(plain, dict):
        return {key: strict(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [strict(value) for value in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain
