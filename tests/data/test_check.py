from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aicompress.data import Data, problems


def test_a_good_source_has_no_problem(table: dict[str, str], text_file: Path, digits_npz: Path) -> None:
    assert problems(Data(**table, labels="label")) == []
    assert problems(Data(text=str(text_file))) == []
    assert problems(Data(arrays=str(digits_npz), inputs="test_images", labels="test_labels")) == []
    assert problems(Data(hub="hf://datasets/org/absent")) == []


def test_an_unknown_column_is_found(table: dict[str, str]) -> None:
    (problem,) = problems(Data(**table, labels="lable"))
    assert problem.hint == "did you mean 'label'?"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": "empty.txt"}, "holds no sample"),
        ({"csv": "head.csv", "field": "a"}, "holds no sample"),
        ({"text": "absent.txt"}, "does not exist"),
        ({"arrays": "a.npz", "inputs": "x", "labels": "y"}, "no array 'y'"),
        ({"arrays": "empty.txt", "inputs": "x"}, "not an .npz"),
        ({"pairs": "head.csv", "columns": (0, 1), "score": 2}, "column 2 is asked for"),
    ],
)
def test_what_would_stop_a_run_is_found_before_it(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "head.csv").write_text("a,b\n")
    np.savez(tmp_path / "a.npz", x=np.ones(2))
    (problem,) = problems(Data(**fields).relative_to(tmp_path))
    assert words in problem.message


@pytest.mark.parametrize(
    ("kind", "row"), [("text", "a line\n"), ("jsonl", '{"text": "a"}\n'), ("csv", "text\n"), ("pairs", "a,b,1\n")]
)
def test_a_text_is_read_to_its_last_byte(kind: str, row: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"columns": (0, 1), "score": 2} if kind == "pairs" else {}
    path = tmp_path / "a.csv"
    for end, words in (
        (b"caf\xe9\n", "line 1001: is not UTF-8"),
        (b"\0", "line 1001: holds NUL"),
        (b"caf\xc3", "1001"),
    ):
        path.write_bytes(row.encode() * 1000 + end)
        (problem,) = problems(Data(**{kind: str(path)}, **fields))
        assert words in problem.message
    path.write_bytes(row.encode() * 1000 + "café\n".encode())
    assert problems(Data(**{kind: str(path)}, **fields)) == []


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows_of_json_are_no_running_text(name: str, tmp_path: Path) -> None:
    rows = '{"text": "a"}' if name == "rows.jsonl" else '[{"text": "a"}]'
    (tmp_path / name).write_text(f"\n{rows}\n")
    (problem,) = problems(Data(text=str(tmp_path / name)))
    assert "braces and keys would be read as text" in problem.message
    assert f"jsonl: {name}" in problem.hint
    assert problems(Data(jsonl=str(tmp_path / name))) == []


@pytest.mark.parametrize(
    ("begin", "what", "todo"),
    [(b"PAR1", "parquet", "parquet:"), (b"\x1f\x8b", "gzip", "gunzip"), (b"PK\x03\x04", "zip", "unpack")],
)
def test_a_binary_file_is_named(begin: bytes, what: str, todo: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(begin + b"\0\xff" * 40)
    (problem,) = problems(Data(text=str(tmp_path / "a.txt")))
    assert what in problem.message
    assert todo in problem.hint
