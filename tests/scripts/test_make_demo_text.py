from __future__ import annotations

from pathlib import Path

import pytest

from scripts.make_demo_text import main, paragraphs, part_of, sentences, split_sentences

TOPIC = """The "assert" statement
**********************

Assert statements are a convenient way to insert
debugging assertions into a *program*:

   assert_stmt ::= "assert" expression

   >>> assert 1 + 1 == 2

+------+------+
| a    | b    |
+------+------+

1. This is for pseudo-
   code, e.g. That of a manual. It is short.
"""


def test_paragraphs_are_running_text_without_markup() -> None:
    assert list(paragraphs(TOPIC)) == [
        "Assert statements are a convenient way to insert debugging assertions into a program:",
        "This is for pseudo-code, e.g. That of a manual. It is short.",
    ]


def test_sentences_end_at_a_full_stop_and_not_at_an_abbreviation() -> None:
    text = "This is for code, e.g. That of a manual. It is short. Is this one long enough? The last one is open"
    assert list(split_sentences(text)) == ["This is for code, e.g. That of a manual.", "Is this one long enough?"]


def test_a_sentence_is_kept_only_where_it_comes_first() -> None:
    one, two = "The first sentence of both topics.", "The second sentence of one topic."
    assert sentences({"b": f"{one} {two}", "a": f"{one} {one}"}) == {"a": (one,), "b": (two,)}


def test_topics_are_divided_by_name_in_about_the_shares() -> None:
    names = [str(number) for number in range(2000)]
    held_out, tuning = ([name for name in names if part_of(name, 0.1, 0.05) == part] for part in ("heldout", "tuning"))
    assert 150 < len(held_out) < 250
    assert 70 < len(tuning) < 130
    assert all(part_of(name, 0.2, 0.05) == "heldout" for name in [*held_out, *tuning])
    assert {part_of(name, 0.1, 0.0) for name in tuning} == {"train"}


def test_the_files_share_no_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path)])
    train, tuning, held_out = (
        (tmp_path / f"{name}.txt").read_text().splitlines() for name in ("train", "tuning", "heldout")
    )
    assert len(train) > 5000
    assert len(tuning) > 150
    assert len(held_out) > 300
    assert len({*train, *tuning, *held_out}) == len(train) + len(tuning) + len(held_out)
    assert f"heldout.txt: {len(held_out)} sentences" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout.txt", "train.txt", "tuning.txt"]
