"""Alphabets: characters of Unicode scripts, categories and ranges."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import regex

from aicompress.errors import RecipeError

_RANGE = re.compile(r"(?P<first>U\+[0-9a-fA-F]{1,6}|.)\s*-\s*(?P<last>U\+[0-9a-fA-F]{1,6}|.)", re.DOTALL)
# What every script is written with: ASCII but for its letters, and punctuation.
_ALWAYS = r"\x00-@\[-`{-\x7f\p{Punctuation}"


def written_in(alphabet: Sequence[str]) -> Callable[[str], bool]:
    """Whether a text has no other characters than an alphabet's, punctuation, and ASCII but for its letters.

    Args:
        alphabet: scripts and categories of Unicode, and ranges such as `a-z` and `U+0400-U+04FF`.

    Raises:
        RecipeError: a name that Unicode does not have, or a range that runs backwards.
    """
    pattern = regex.compile(rf"[{_ALWAYS}{''.join(map(_class, alphabet))}]*")
    return lambda text: pattern.fullmatch(text) is not None


def _class(name: str) -> str:
    """One name or range as a part of a class of characters."""
    between = _RANGE.fullmatch(name)
    if between is not None:
        first, last = (_character(between[end]) for end in ("first", "last"))
        if first > last:
            raise RecipeError(f"method.alphabet: the range {name!r} runs backwards", "give its first character first")
        return f"{regex.escape(first)}-{regex.escape(last)}"
    for kind in ("Script=", ""):
        written = rf"\p{{{kind}{name}}}"
        try:
            if re.fullmatch(r"[A-Za-z][A-Za-z _]*", name):
                regex.compile(written)
                return written
        except regex.error:
            continue
    hint = "a script (latin, cyrillic), a category (currency_symbol), or a range (a-z, U+0400-U+04FF)"
    raise RecipeError(f"method.alphabet: Unicode has no {name!r}", hint)


def _character(given: str) -> str:
    """A character as itself, or by its code point.

    Raises:
        RecipeError: there is no such code point.
    """
    if len(given) == 1:
        return given
    try:
        return chr(int(given[2:], 16))
    except ValueError as error:
        raise RecipeError(f"method.alphabet: {given} is no code point", "they go to U+10FFFF") from error
