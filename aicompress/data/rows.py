"""Rows of a table file, one at a time: csv, tsv, JSON, parquet, or a dataset of the Hugging Face hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aicompress.data.section import Data
from aicompress.data.text_files import data_errors, lines
from aicompress.data.values import is_empty, no_such, root, value_at
from aicompress.errors import RecipeError

Row = tuple[str, tuple[Any, ...]]  # where it stands, for messages; its values in the order of the columns asked for


@dataclass
class FullRows:
    """Rows of a source whose columns all hold something.

    Attributes:
        data: the source.
        columns: what is read of each row.
        skipped: rows so far of which a column is null or empty; they are left out.
    """

    data: Data
    columns: Sequence[str | int]
    skipped: int = 0

    def __iter__(self) -> Iterator[Row]:
        """Give the rows.

        Raises:
            RecipeError: as `rows`, or no row holds anything.
        """
        empty = True
        for where, values in rows(self.data, self.columns):
            if any(map(is_empty, values)):
                self.skipped += 1
                continue
            empty = False
            yield where, values
        if empty and self.skipped:
            named = " or ".join(map(repr, self.columns))
            message = f"{self.data.path}: all {self.skipped:,} rows are null or empty in {named}"
            raise RecipeError(message, "name what holds the text, with `field`")


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
        yield from _json(path, [str(column) for column in columns])
    elif kind == "parquet":
        yield from _parquet(path, [str(column) for column in columns])
    elif kind in ("csv", "tsv", "txt"):
        yield from _separated(path, columns)
    else:
        raise RecipeError(f"{path.name} is not a table that can be read", "tsv, csv, jsonl or parquet")


def texts_of(data: Data) -> FullRows:
    """The rows of a source with their text field.

    Raises:
        RecipeError: the source has no texts.
    """
    if data.kind in ("arrays", "pairs", "drawn"):
        raise RecipeError(f"{data.path}: {data.kind} hold no texts", "give text, jsonl, csv, parquet or hub")
    return FullRows(data, [data.field])


def _separated(path: Path, columns: Sequence[str | int]) -> Iterator[Row]:
    # In a .tsv a quote is an ordinary character: sentence files hold unbalanced ones.
    plain = path.suffix.lower() != ".csv"
    delimiter, quoting = ("\t", csv.QUOTE_NONE) if plain else (_delimiter(path, columns), csv.QUOTE_MINIMAL)
    reader = csv.reader(lines(path, newline=""), delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
    positions: list[int] | None = None
    if all(isinstance(column, int) for column in columns):
        positions = [int(column) for column in columns]
    try:
        for row in reader:
            if not row or (positions is None and not any(cell.strip() for cell in row)):
                continue  # a blank line, also before the header
            if positions is None:
                positions = [_position(path, str(column), row) for column in columns]
            else:
                yield f"line {reader.line_num}", _picked(path, reader.line_num, row, positions)
    except csv.Error as error:
        raise RecipeError(
            f"{path.name}, line {reader.line_num}: {error}", "long texts fit JSON lines better"
        ) from error


def _delimiter(path: Path, columns: Sequence[str | int]) -> str:
    """What divides a .csv: the comma, unless its header has the columns only where semicolons or tabs divide it.

    Spreadsheets write semicolons where the comma is the decimal point.
    """
    header = next((line for line in lines(path, newline="") if line.strip()), "")
    named = {str(column) for column in columns if isinstance(column, str)}
    fitting = (each for each in ",;\t" if named and named <= set(next(csv.reader([header], delimiter=each), [])))
    return next(fitting, ",")


def _position(path: Path, column: str, header: Sequence[str]) -> int:
    if column not in header:
        raise RecipeError(f"{path.name} has no column {column!r}", no_such(column, list(header)))
    return list(header).index(column)


def _picked(path: Path, line: int, row: Sequence[str], positions: Sequence[int]) -> tuple[str, ...]:
    if max(positions) >= len(row):
        raise RecipeError(
            f"{path.name}, line {line}: column {max(positions)} is asked for, there are {len(row)}",
            "numbers count columns from 0; .tsv is divided by tabs, .csv by commas",
        )
    return tuple(row[position] for position in positions)


def _json(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    for where, row in json_rows(path):
        yield where, tuple(_value(f"{path.name}, {where}", row or dict.fromkeys(columns), name) for name in columns)


def _value(place: str, row: Mapping[str, Any], name: str) -> Any:
    try:
        return value_at(row, name)
    except KeyError as error:
        raise RecipeError(f"{place} has no field {name!r}", no_such(name, list(row))) from error


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with data_errors(path), pyarrow.parquet.ParquetFile(path) as file:
            roots = _roots(path, columns, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=roots):
                table = [batch.column(root).to_pylist() for root in roots]
                for values in zip(*table, strict=True):
                    number += 1
                    row, place = dict(zip(roots, values, strict=True)), f"{path.name}, row {number}"
                    yield f"row {number}", tuple(_value(place, row, name) for name in columns)
    except pyarrow.ArrowException as error:
        message = f"{path} is not a parquet file that can be read: {error}"[:300]
        raise RecipeError(message, "write it again, or give the rows as JSON lines") from error


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
    for number, row in enumerate(table.select_columns(_roots(Path(name), columns, table.column_names)), 1):
        yield f"row {number}", tuple(_value(f"{name}, row {number}", row, column) for column in columns)


def _roots(path: Path, columns: Sequence[str], known: Sequence[str]) -> list[str]:
    """The columns of a table that hold the names asked for, each once.

    Raises:
        RecipeError: one does not exist.
    """
    try:
        return list(dict.fromkeys(root(column, known) for column in columns))
    except KeyError as error:
        column = str(error.args[0])
        raise RecipeError(f"{path.name} has no column {column!r}", no_such(column, known)) from error


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
    with data_errors(path):
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
