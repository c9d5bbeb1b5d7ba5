"""JSON whose reading is bounded before it begins: how deep it nests, and how many values so many bytes hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aicompress.errors import CheckpointError

DEEPEST = 100  # brackets inside one another
HARMLESS = 1 << 20  # bytes that may hold anything
SPARSE = 16  # bytes beyond them that a list or a mapping takes at least; those of a header and an index take more

_QUOTE, _LIST, _MAPPING, _LIST_END, _MAPPING_END = b'"[{]}'


def parsed(raw: bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON in UTF-8.

    Args:
        raw: the text.
        pairs: makes a mapping of its keys and values; None: a dict.

    Raises:
        ValueError: not JSON, nested too deeply, or almost nothing but brackets.
    """
    require_bounded(raw)
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def require_bounded(raw: bytes) -> None:
    """Refuse JSON that would take far more memory than its text.

    Raises:
        ValueError: it does.
    """
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw
    text = np.frombuffer(plain, dtype=np.uint8)
    outside = ~np.logical_xor.accumulate(text == _QUOTE)
    opening = (((text == _LIST) | (text == _MAPPING)) & outside).view(np.int8)
    count = int(opening.sum(dtype=np.int64))
    if count > (HARMLESS + len(raw)) // SPARSE:
        raise ValueError(f"it opens {count:,} brackets in {len(raw):,} bytes")
    steps = opening - (((text == _LIST_END) | (text == _MAPPING_END)) & outside).view(np.int8)
    if count and int(np.cumsum(steps[steps != 0], dtype=np.int64).max()) > DEEPEST:
        raise ValueError("it is nested too deeply")


class Twice(ValueError):
    """A key that a JSON mapping has twice."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of keys and values of which none may come twice, as `pairs` of `parsed`.

    Raises:
        Twice: one does.
    """
    pairs_by_key: dict[str, Any] = {}
    for key, value in pairs:
        if key in pairs_by_key:
            raise Twice(key)
        pairs_by_key[key] = value
    return pairs_by_key


def plain_where_same(text: str) -> Any:
    """What a text of JSON says, where writing that gives the same text; else the text."""
    try:
        plain = parsed(text.encode())
    except ValueError:
        return text
    return plain if isinstance(plain, dict) and compact(plain) == text else text


def compact(plain: Any) -> str:
    """JSON as a manifest is written."""
    return json.dumps(plain, separators=(",", ":"), ensure_ascii=False)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """
    try:
        plain = parsed(path.read_bytes())
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is not JSON: {reason}", "download or copy it again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error
    if not isinstance(plain, dict):
        raise CheckpointError(f"{path} is not a JSON mapping", "download or copy it again")
    return plain
