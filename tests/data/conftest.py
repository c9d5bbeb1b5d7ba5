"""A table of labelled texts, written in every format that is read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

ROWS = [("A first text, with a comma.", 1), ('One with "quotes".', 0), ("And one\nof two lines.", 1)]


@pytest.fixture(params=["jsonl", "csv", "parquet"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The source key of a data section and the path of the table in that format."""
    path = tmp_path / f"table.{request.param}"
    if request.param == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS) + "\n\n")
    elif request.param == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *ROWS])
    else:
        texts, labels = zip(*ROWS, strict=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path)
    return {request.param: str(path)}
