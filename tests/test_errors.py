"""Pieces of messages: one line of another error, and some of many names."""

from __future__ import annotations

import pytest

from aicompress.errors import Problems, RecipeError, first_line, listed


@pytest.mark.parametrize(
    ("said", "otherwise", "line"),
    [
        ("\n no such key \nat line 3", "", "no such key"),
        ("", "", "ValueError"),
        (" \n", "it is damaged", "it is damaged"),
    ],
)
def test_the_first_line_of_an_error(said: str, otherwise: str, line: str) -> None:
    assert first_line(ValueError(said), otherwise).strip() == line


def test_some_of_many_names() -> None:
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(iter("abcd")) == "a, b, c, ..."
    assert listed([1, 2], most=1) == "1, ..."
    assert listed([]) == ""


def test_what_two_checks_find_is_told_once() -> None:
    missing = [RecipeError("a.npz does not exist", "set the path") for _ in range(2)]
    assert len(Problems([*missing, Problems([missing[0], RecipeError("another", "hint")])]).problems) == 2
