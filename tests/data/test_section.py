from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from aicompress.data import Data
from aicompress.errors import CompressError
from aicompress.recipe import validated


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of text"),
        ({"text": "a.txt", "csv": "b.csv"}, "not 2"),
        ({"arrays": "a.npz"}, "`inputs`"),
        ({"pairs": "a.tsv"}, "`columns`"),
        ({"pairs": "a.tsv", "columns": [0, 1], "score": "score"}, "all numbers"),
        ({"csv": "a.csv", "columns": ["a", "b"]}, "belong to `pairs`"),
        ({"text": "a.txt", "samples": 0}, "samples"),
        ({"text": "a.txt", "lenght": 12}, "lenght"),
    ],
)
def test_a_wrong_section_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Data(**fields)
    with pytest.raises(CompressError):
        validated(Data, fields, "calibration")


def test_paths_become_absolute_and_hub_names_stay(tmp_path: Path) -> None:
    assert Data(text="a/b.txt").relative_to(tmp_path).path == str(tmp_path / "a" / "b.txt")
    pairs = Data(pairs="p.tsv", columns=(5, 6), score=4).relative_to(tmp_path)
    assert (pairs.kind, pairs.path, pairs.columns) == ("pairs", str(tmp_path / "p.tsv"), (5, 6))
    assert Data(hub="hf://datasets/org/name").relative_to(tmp_path).path == "hf://datasets/org/name"
