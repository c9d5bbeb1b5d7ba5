"""Check a data source before anything runs."""

from __future__ import annotations

from pathlib import Path

from aicompress.data.arrays import require_same_samples
from aicompress.data.rows import FullRows
from aicompress.data.section import Data, kind_of
from aicompress.data.text_files import lines, require_text
from aicompress.errors import CompressError, RecipeError


def problems(data: Data) -> list[CompressError]:
    """What would stop a source: missing file, unknown column or array, no sample at all, anything that is no text.

    Columns are judged by the first sample; a text is read whole, for the run would stop at its last line.

    A dataset of the hub is not looked at, since that could mean a download.
    """
    try:
        _first_sample(data)
    except CompressError as error:
        return [error]
    return []


def _first_sample(data: Data) -> None:
    if not data.is_file:
        return
    path = Path(data.path)
    if data.kind == "arrays":
        require_same_samples(data)
        return
    if path.suffix != ".parquet" and data.kind != "parquet":
        require_text(path)
    if data.kind == "text":
        first = next((line.strip() for line in lines(path) if line.strip()), "")
        empty = not first
        if kind_of(data.path) == "jsonl" and first.startswith(("{", "[")):
            hint = f"write `jsonl: {path.name}` in the place of `text:`, with `field` where the texts are not in 'text'"
            raise RecipeError(f"{data.path} holds rows of JSON, whose braces and keys would be read as text", hint)
    else:
        empty = next(iter(FullRows(data, _columns(data))), None) is None
    if empty:
        raise RecipeError(f"{data.path} holds no sample", "give a file with text in it")


def _columns(data: Data) -> list[str | int]:
    if data.columns is not None and data.score is not None:
        return [*data.columns, data.score]
    return [data.field] if data.labels is None else [data.field, data.labels]
