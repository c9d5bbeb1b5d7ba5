"""Pieces of messages: one line of another error, and some of many names."""

from __future__ import annotations

import pytest

from aicompress.errors import first_line, listed


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
