from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from aicompress.data import Data, labelled, pairs, problems, sentences
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
        ("a.jsonl", b'["text"]\n', "item 1 is not a JSON object"),
        ("a.jsonl", b'[{"text": "one"},\n', "the array is not JSON at line 2"),
        ("a.jsonl", b"7\n", "line 1 is not a JSON object"),
        ("a.jsonl", b"[" * 200_000, "not JSON that can be read"),
        ("a.jsonl", b'{"text": ' + b"[" * 200_000, "not JSON that can be read"),
        ("a.jsonl", b'{"text": "one"}\n{"body": "two"}\n', "line 2 has no field 'text'"),
        ("a.jsonl", b'{"text": "one"}\n{"text": 7}\n', "line 2: 'text' is int, not text"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: is not UTF-8"),
        ("a.jsonl", b'{"text": "a\\u0000b"}\n', "line 1: 'text' holds NUL characters"),
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


EMPTY = (None, "", "  ", [], [None, ""])


def write_rows(path: Path, rows: list[Any]) -> Path:
    """The same rows as JSON lines, as one array, or as a parquet file."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows, indent=1) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_nested_texts_are_read_by_their_path(name: str, tmp_path: Path) -> None:
    rows = [
        {"id": {"text": f"text {n}", "turns": [{"say": f"a {n}"}, {"say": None}, {"say": f"b {n}"}]}} for n in range(2)
    ]
    kind = "parquet" if name.endswith("parquet") else "jsonl"
    source = {kind: str(write_rows(tmp_path / name, rows))}
    assert sentences(Data(**source, field="id.text"))[0] == ["text 0", "text 1"]
    assert sentences(Data(**source, field="id.turns.say"))[0] == ["a 0\nb 0", "a 1\nb 1"]
    assert sentences(Data(**source, field="id.turns.0.say"))[0] == ["a 0", "a 1"]
    with pytest.raises(RecipeError, match=r"row 1 has no field 'id.name'|(line|item) 1 has no field 'id.name'"):
        sentences(Data(**source, field="id.name"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv", "a.tsv"])
def test_empty_rows_are_left_out_and_counted(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    kind = {"json": "jsonl", "tsv": "csv"}.get(path.suffix[1:], path.suffix[1:])
    if kind == "csv":
        mark = "," if name == "a.csv" else "\t"
        path.write_text("\n   \n" + "\n".join(mark.join(row) for row in ("tl", ("", "1"), "A0", (" ", "0"), "B")))
        path.write_text(path.read_text().replace("t", "text", 1).replace("l", "label", 1).replace("B", f"B{mark}"))
    else:
        rows = [{"text": each, "label": "0"} for each in (None, "A", " ", "B")]
        rows[3]["label"] = None
        write_rows(path, rows)
    texts, source = sentences(Data(**{kind: str(path)}))
    assert (texts, source.skipped) == (["A", "B"], 2)
    texts, labels, source = labelled(Data(**{kind: str(path)}, labels="label"))
    assert (texts, labels.tolist(), source.skipped) == (["A"], [0], 3)


def test_rows_that_hold_nothing_at_all_are_left_out(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [None, {}, *({"text": value} for value in EMPTY), {"text": "A"}])
    assert sentences(Data(jsonl=str(path)))[1].skipped == 2 + len(EMPTY)
    path = write_rows(tmp_path / "a.jsonl", [{"text": value} for value in EMPTY])
    with pytest.raises(RecipeError, match="all 5 rows are null or empty in 'text'"):
        sentences(Data(jsonl=str(path)))
    (problem,) = problems(Data(jsonl=str(path)))
    assert problem.message.endswith("null or empty in 'text'")


@pytest.mark.parametrize("first", ["\n", ",\n", "\r\n \n"])
def test_a_blank_line_before_the_names_of_columns_is_none(first: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"{first}text,label\none,1\n", encoding="utf-8", newline="")
    assert [text for _, (text,) in rows(Data(csv=str(path)), ["text"])] == ["one"]


def test_a_chat_is_no_text_and_its_contents_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "Hello."}]}])
    with pytest.raises(RecipeError, match="holds the messages of a chat"):
        sentences(Data(jsonl=str(path), field="messages"))
    assert sentences(Data(jsonl=str(path), field="messages.content"))[0] == ["Hello."]
    with pytest.raises(RecipeError, match="no field 'text'") as caught:
        sentences(Data(jsonl=str(path)))
    assert caught.value.hint.startswith("field: messages")


GOOD = {"text": "a line\n", "jsonl": '{"text": "a line"}\n', "csv": "text\na line\n", "pairs": "one,other,1\n"}


@pytest.mark.parametrize("kind", GOOD)
def test_what_is_no_text_is_refused_with_a_hint(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    good = GOOD[kind]
    fields: dict[str, Any] = {"columns": (0, 1), "score": 2} if kind == "pairs" else {}
    read: Any = pairs if kind == "pairs" else sentences
    for content, words in (
        (good.encode() + b"\x00\x01\n", "holds NUL characters, so it is no text"),
        (good.encode() + b"caf\xe9\n", r"line \d: is not UTF-8 text"),
        (good.encode("utf-16"), "not UTF-8 text but UTF-16"),
        (good.encode("utf-16-le"), "line 1: holds NUL characters"),
    ):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=words) as caught:
            read(Data(**{kind: str(path)}, **fields))
        assert "UTF-" in caught.value.hint


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


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_is_divided_as_its_header_is(delimiter: str, tmp_path: Path) -> None:
    lines = [["id", "text"], ["1", f'"one{delimiter} two"'], ["2", '"three"']]
    (tmp_path / "a.csv").write_text("\ufeff" + "\n".join(map(delimiter.join, lines)))
    assert [text for _, (text,) in rows(Data(csv=str(tmp_path / "a.csv")), ["text"])] == [
        f"one{delimiter} two",
        "three",
    ]
    with pytest.raises(RecipeError, match="no column 'body'"):
        list(rows(Data(csv=str(tmp_path / "a.csv")), ["body"]))
