"""JSON whose reading is bounded before it begins: how deep it nests, and how many values so many bytes hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

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
