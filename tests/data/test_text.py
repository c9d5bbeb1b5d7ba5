from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from aicompress.data import Data, batches, labelled, pairs, sentences
from aicompress.errors import CheckpointError, RecipeError
from tests.data.conftest import ROWS


def test_lines_of_a_text_without_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("One.\r\n\n  Two.  \n\nThree.")
    assert sentences(Data(text=str(path)))[0] == ["One.", "Two.", "Three."]
    assert sentences(Data(text=str(path), samples=2))[0] == ["One.", "Two."]


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("\n \n")
    with pytest.raises(RecipeError, match="holds no sample"):
        sentences(Data(text=str(path)))


def test_labelled_texts_of_every_format(table: dict[str, str]) -> None:
    texts, labels, source = labelled(Data(**table, labels="label"))
    assert texts == [text for text, _ in ROWS]
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 0, 1]
    assert source.samples == 3


def test_a_label_of_minus_one_is_one_that_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,label\nOne.,1\nTwo.,-1\n")
    assert labelled(Data(csv=str(path), labels="label"))[1].tolist() == [1, -1]
    path.write_text("text,label\nOne.,-2\n")
    with pytest.raises(RecipeError, match="'-2' is not a class"):
        labelled(Data(csv=str(path), labels="label"))


def test_a_choice_keeps_texts_with_their_labels(table: dict[str, str]) -> None:
    texts, labels, _ = labelled(Data(**table, labels="label", samples=2), seed=1)
    assert set(zip(texts, labels.tolist(), strict=True)) < set(ROWS)


def test_class_names_are_looked_up_in_the_model(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,label\ngood,positive\nbad,negative\n")
    data = Data(csv=str(path), labels="label")
    assert labelled(data, classes=["negative", "positive"])[1].tolist() == [1, 0]
    with pytest.raises(RecipeError, match="line 3: label 'negative' is not a class") as caught:
        labelled(data, classes=["negativ", "positive"])
    assert caught.value.hint == "did you mean 'negativ'?"


@pytest.mark.parametrize("label", ["1.5", "true", "[1]"])
def test_a_label_that_is_no_class_is_refused(label: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"text": "one", "label": {label}}}\n')
    with pytest.raises(RecipeError, match="line 1: label"):
        labelled(Data(jsonl=str(path), labels="label"))


def test_sources_without_the_asked_kind_of_samples_are_refused(text_file: Path, digits_npz: Path) -> None:
    with pytest.raises(RecipeError, match="names no `labels`"):
        labelled(Data(text=str(text_file)))
    with pytest.raises(RecipeError, match="no labelled texts"):
        labelled(Data(text=str(text_file), labels="label"))
    with pytest.raises(RecipeError, match="no sentence pairs"):
        pairs(Data(text=str(text_file)))
    with pytest.raises(RecipeError, match="hold no texts"):
        sentences(Data(arrays=str(digits_npz), inputs="test_images"))


def test_pairs_by_column_number_with_open_quotes(tmp_path: Path) -> None:
    path = tmp_path / "sts.tsv"
    path.write_text('news\t4.750\tA "child rides.\tA child is riding.\textra\nnews\t0.5\tOne\tOther"\n')
    first, second, scores, source = pairs(Data(pairs=str(path), columns=(2, 3), score=1))
    assert first == ['A "child rides.', "One"]
    assert second == ["A child is riding.", 'Other"']
    assert scores.tolist() == [4.75, 0.5]
    assert scores.dtype == torch.float32
    assert source.samples == 2


@pytest.mark.parametrize(
    ("name", "content"), [("p.csv", 'b,s,a\n"two, 2",3,one\n'), ("p.jsonl", '{"a": "one", "b": "two, 2", "s": 3}\n')]
)
def test_pairs_by_column_name(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    first, second, scores, _ = pairs(Data(pairs=str(tmp_path / name), columns=("a", "b"), score="s"))
    assert (first, second, scores.tolist()) == (["one"], ["two, 2"], [3.0])


def test_a_header_read_as_a_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.write_text("a\tb\tscore\none\ttwo\t3\n")
    with pytest.raises(RecipeError, match="line 1: score 'score' is not a number"):
        pairs(Data(pairs=str(path), columns=(0, 1), score=2))
    with pytest.raises(RecipeError, match="column 6 is asked for, there are 3") as caught:
        pairs(Data(pairs=str(path), columns=(5, 6), score=2))
    assert "from 0" in caught.value.hint


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a table"):
        pairs(Data(pairs=str(tmp_path / "p.xlsx"), columns=(0, 1), score=2))


def test_batches_keep_order_pad_to_their_longest_and_cut(tiny_bert: Path, text_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    texts, _ = sentences(Data(text=str(text_file), samples=10))
    found = list(batches(texts, tokenizer, batch_size=4, length=16))
    assert [len(batch["input_ids"]) for batch in found] == [4, 4, 2]
    assert all(batch["input_ids"].shape == batch["attention_mask"].shape for batch in found)
    assert all(batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1] <= 16 for batch in found)
    for text, ids in zip(texts, [row for batch in found for row in batch["input_ids"]], strict=True):
        alone = tokenizer(text, truncation=True, max_length=16)["input_ids"]
        assert ids[: len(alone)].tolist() == alone


def test_batches_need_a_tokenizer_that_can_pad(tiny_llama: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        list(batches(["text"], None, 1, 8))
    with pytest.raises(CheckpointError, match="no padding token"):
        list(batches(["text"], AutoTokenizer.from_pretrained(tiny_llama), 1, 8))
