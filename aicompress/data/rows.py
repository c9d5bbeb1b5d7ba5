"""Rows of a table file, one at a time: csv, tsv, JSON lines, parquet, or a dataset of the Hugging Face hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aicompress.data.section import Data
from aicompress.errors import RecipeError, suggestion

Row = tuple[str, tuple[Any, ...]]  # where it stands, for messages; its values in the order of the columns asked for


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say clearly why a data file cannot be read.

    Raises:
        RecipeError: it is missing, a folder, forbidden, or not UTF-8 text.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise RecipeError(
            f"data file {path} does not exist",
            "give --text FILE, or set the path: one in a recipe is relative to the recipe's folder",
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error.reason}", "convert it to UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}", "") from error


def rows(data: Data, columns: Sequence[str | int]) -> Iterator[Row]:
    """Rows of a source as tuples of the named columns; numbers count columns from 0 in a file without a header.

    Raises:
        RecipeError: the file cannot be read, or a row lacks a column.
    """
    kind: str = data.kind
    if kind == "hub":
        yield from _hub(data, [str(column) for column in columns])
        return
    path = Path(data.path)
    if kind == "pairs":
        kind = path.suffix.removeprefix(".").lower()
    if kind in ("jsonl", "json"):
        yield from _json_lines(path, columns)
    elif kind == "parquet":
        yield from _parquet(path, [str(column) for column in columns])
    elif kind in ("csv", "tsv", "txt"):
        yield from _separated(path, columns)
    else:
        raise RecipeError(f"{path.name} is not a table that can be read", "tsv, csv, jsonl or parquet")


def fields(data: Data) -> Iterator[str]:
    """The text field of every row.

    Raises:
        RecipeError: the source has no texts, or a row's field is not text.
    """
    if data.kind in ("arrays", "pairs"):
        raise RecipeError(f"{data.path}: {data.kind} hold no texts", "give text, jsonl, csv, parquet or hub")
    for where, (value,) in rows(data, [data.field]):
        yield as_text(data, where, data.field, value)


def as_text(data: Data, where: str, column: str | int, value: object) -> str:
    """A row's value, which must be text.

    Raises:
        RecipeError: it is not.
    """
    if not isinstance(value, str):
        raise RecipeError(f"{data.path}, {where}: {column!r} is {type(value).__name__}, not text", "")
    return value


def _separated(path: Path, columns: Sequence[str | int]) -> Iterator[Row]:
    # In a .tsv a quote is an ordinary character: sentence files hold unbalanced ones.
    plain = path.suffix.lower() != ".csv"
    delimiter, quoting = ("\t", csv.QUOTE_NONE) if plain else (",", csv.QUOTE_MINIMAL)
    with readable(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
        positions: list[int] | None = None
        if all(isinstance(column, int) for column in columns):
            positions = [int(column) for column in columns]
        try:
            for row in reader:
                if positions is None:
                    positions = [_position(path, str(column), row) for column in columns]
                elif row:
                    yield f"line {reader.line_num}", _picked(path, reader.line_num, row, positions)
        except csv.Error as error:
            raise RecipeError(
                f"{path.name}, line {reader.line_num}: {error}", "long texts fit JSON lines better"
            ) from error


def _position(path: Path, column: str, header: Sequence[str]) -> int:
    if column not in header:
        raise RecipeError(f"{path.name} has no column {column!r}", suggestion(column, list(header)))
    return list(header).index(column)


def _picked(path: Path, line: int, row: Sequence[str], positions: Sequence[int]) -> tuple[str, ...]:
    if max(positions) >= len(row):
        raise RecipeError(
            f"{path.name}, line {line}: column {max(positions)} is asked for, there are {len(row)}",
            "numbers count columns from 0; .tsv is divided by tabs, .csv by commas",
        )
    return tuple(row[position] for position in positions)


def _json_lines(path: Path, columns: Sequence[str | int]) -> Iterator[Row]:
    with readable(path), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                plain = json.loads(line)
            except json.JSONDecodeError as error:
                raise RecipeError(
                    f"{path.name}, line {number} is not JSON: {error.msg}", "one object a line"
                ) from error
            if not isinstance(plain, dict):
                raise RecipeError(f"{path.name}, line {number} is not a JSON object", "one object a line")
            for column in columns:
                if column not in plain:
                    hint = suggestion(str(column), list(plain))
                    raise RecipeError(f"{path.name}, line {number} has no field {column!r}", hint)
            yield f"line {number}", tuple(plain[column] for column in columns)


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with readable(path), pyarrow.parquet.ParquetFile(path) as file:
            for column in columns:
                _position(path, column, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=list(columns)):
                table = [batch.column(column).to_pylist() for column in columns]
                for values in zip(*table, strict=True):
                    number += 1
                    yield f"row {number}", values
    except pyarrow.ArrowException as error:
        raise RecipeError(f"{path} is not a parquet file that can be read: {error}"[:300], "") from error


def _hub(data: Data, columns: Sequence[str]) -> Iterator[Row]:
    name = data.path.removeprefix("hf://").removeprefix("datasets/")
    import datasets

    try:
        table = datasets.load_dataset(name, split=data.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # absent, out of reach, no such split
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(
            f"dataset {name!r} cannot be loaded: {first}"[:300], "check its name, split and the network"
        ) from error
    for column in columns:
        _position(Path(name), column, table.column_names)
    for number, row in enumerate(table.select_columns(list(columns)), 1):
        yield f"row {number}", tuple(row[column] for column in columns)
