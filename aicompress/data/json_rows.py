"""Rows of JSON files: one object a line, or one array of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aicompress.data.text_files import lines, readable
from aicompress.errors import RecipeError

ONE_A_LINE = "one object a line, or one array of objects"


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and its object; null where a row holds nothing.

    Raises:
        RecipeError: the file cannot be read, is no JSON, or a row is no object.
    """
    source = _array(path) if _begins_an_array(path) else _lines(path)
    for where, row in source:
        if row is not None and not isinstance(row, dict):
            raise RecipeError(f"{path.name}, {where} is not a JSON object", ONE_A_LINE)
        yield where, row


def _begins_an_array(path: Path) -> bool:
    """Whether the first line that says anything opens an array."""
    first = next((line for line in lines(path) if line.strip()), "")
    return first.lstrip().startswith("[")


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    with readable(path):
        text = "".join(lines(path))
    for number, row in enumerate(_parsed(text, path, "the array"), 1):
        yield f"item {number}", row


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            yield f"line {number}", _parsed(line, path, f"line {number}")


def _parsed(text: str, path: Path, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f" at line {error.lineno}" if where == "the array" else ""
        raise RecipeError(f"{path.name}, {where} is not JSON{at}: {error.msg}", ONE_A_LINE) from error
    except (RecursionError, ValueError) as error:  # brackets without end, numbers of thousands of digits
        raise RecipeError(f"{path.name}, {where} is not JSON that can be read: {error}"[:300], ONE_A_LINE) from error
