from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from aicompress.data import Data, sentences
from aicompress.data.rows import rows
from aicompress.errors import RecipeError
from tests.data.conftest import ROWS


def test_every_format_gives_the_same_rows(table: dict[str, str]) -> None:
    found = [(text, int(label)) for _, (text, label) in rows(Data(**table), ["text", "label"])]
    assert found == ROWS


def test_columns_come_in_the_order_asked_for(table: dict[str, str]) -> None:
    assert [text for _, (_, text) in rows(Data(**table), ["label", "text"])] == [text for text, _ in ROWS]


def test_an_unknown_column_is_refused_with_the_nearest(table: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match=r"no (column|field) 'txt'") as caught:
        list(rows(Data(**table), ["txt"]))
    assert caught.value.hint == "did you mean 'text'?"


@pytest.mark.parametrize("kind", ["text", "jsonl", "csv", "parquet"])
def test_a_missing_file_or_a_folder_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape("nothing.csv does not exist")):
        sentences(Data(**{kind: str(tmp_path / "nothing.csv")}))
    with pytest.raises(RecipeError, match=re.escape(str(tmp_path))):
        sentences(Data(**{kind: str(tmp_path)}))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'["text"]\n', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": "one"}\n{"body": "two"}\n', "line 2 has no field 'text'"),
        ("a.jsonl", b'{"text": null}\n', "line 1: 'text' is NoneType, not text"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.csv", b"label,text\n1\n", "line 2: column 1 is asked for, there are 1"),
        ("a.csv", b"text\n" + b"x" * 200_000, "line 2: field larger than field limit"),
        ("a.parquet", b"not parquet at all", "not a parquet file"),
    ],
)
def test_a_damaged_table_is_refused_with_its_place(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        sentences(Data(**{path.suffix[1:]: str(path)}))


def test_quotes_in_a_tsv_are_ordinary_characters(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text('id\ttext\n1\t"An open quote\n2\tthe next row"\n')
    assert sentences(Data(csv=str(path)))[0] == ['"An open quote', 'the next row"']


def test_a_dataset_is_read_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    # A local folder of the name is found before the hub is asked.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    (tmp_path / "org" / "name" / "train.jsonl").write_text("\n".join(lines))
    data = Data(hub="hf://datasets/org/name")
    assert [values for _, values in rows(data, ["text", "label"])] == ROWS
    _, source = sentences(data)
    assert (source.kind, source.sha256, source.samples) == ("hub", "", 3)
    with pytest.raises(RecipeError, match="no column 'txt'"):
        list(rows(data, ["txt"]))
    with pytest.raises(RecipeError, match="cannot be loaded"):
        list(rows(Data(hub="hf://datasets/org/name", split="tests"), ["text"]))


def test_a_dataset_out_of_reach_is_refused() -> None:
    with pytest.raises(RecipeError, match="dataset 'org/absent' cannot be loaded") as caught:
        list(rows(Data(hub="hf://datasets/org/absent"), ["text"]))
    assert "network" in caught.value.hint
