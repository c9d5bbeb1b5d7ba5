"""Numbers of tokens before and after some of them go, and ids in config.json and generation_config.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Numbering:
    """The tokens that stay.

    Attributes:
        kept: their numbers before, ascending.
        size: how many tokens the model had; those beyond, which only the tokenizer knows, stay.
    """

    kept: tuple[int, ...]
    size: int

    @cached_property
    def _new(self) -> Mapping[int, int]:
        return {old: new for new, old in enumerate(self.kept)}

    def __call__(self, token: int) -> int | None:
        """The number of a token afterwards; None for one that goes."""
        return token - self.size + len(self.kept) if token >= self.size else self._new.get(token)


Renumber = Callable[[int], int | None]  # the number that a token has afterwards; None for one that goes

_NAMES = re.compile(r"(?:^|_)(?:token_ids?|token_index|token_idx)$")
_MAPPINGS = {"lang_to_id", "task_to_id"}
_PLACED = "forced_decoder_ids"  # pairs of a place and an id
# Lists of tokens that are never, or always, written: one that goes leaves the list.
_SINGLE = {"suppress_tokens", "begin_suppress_tokens"}
_SEQUENCES = {"bad_words_ids", "sequence_bias"}


def named_ids(section: Mapping[str, Any], size: int) -> set[int]:
    """Ids that a configuration names and cannot do without, of a vocabulary of so many tokens."""
    named: set[int] = set()

    def note(token: int) -> int:
        named.add(token)
        return token

    renumbered(_without_lists(section), note, size)
    return named


def _without_lists(section: Mapping[str, Any]) -> dict[str, Any]:
    left = {key: value for key, value in section.items() if key not in _SINGLE | _SEQUENCES}
    return {key: _without_lists(value) if isinstance(value, dict) else value for key, value in left.items()}


def renumbered(section: Mapping[str, Any], number: Renumber, size: int) -> dict[str, Any]:
    """A configuration with the ids that its tokens have afterwards.

    Args:
        section: its fields; negative ids mean no token and stay, and so do those of a part with another vocabulary.
        number: gives the id afterwards.
        size: how many tokens the vocabulary had.
    """
    return {key: _value(key, value, number, size) for key, value in section.items()}


def _value(key: str, value: Any, number: Renumber, size: int) -> Any:
    if _NAMES.search(key) or key in _MAPPINGS:
        return _each(value, number)
    if key == _PLACED and isinstance(value, list):
        return [[place, _each(token, number)] for place, token in value]
    if key in _SINGLE and isinstance(value, list):
        return [new for token in value if (new := _each(token, number)) is not None]
    if key in _SEQUENCES and isinstance(value, list):
        kept = [_each_of(entry, number) for entry in value]
        return [entry for entry in kept if entry is not None]
    if not isinstance(value, dict) or value.get("vocab_size", size) not in (size, None):
        return value
    return renumbered(value, number, size)


def _each(value: Any, number: Renumber) -> Any:
    """A number, or all numbers of a list or a mapping."""
    if isinstance(value, list):
        return [_each(inner, number) for inner in value]
    if isinstance(value, dict):
        return {key: _each(inner, number) for key, inner in value.items()}
    return number(value) if type(value) is int and value >= 0 else value


def _each_of(entry: Any, number: Renumber) -> Any:
    """A sequence of ids, or [ids, bias]; None where one of its tokens goes."""
    if not isinstance(entry, list):
        return entry
    ids, bias = (entry[0], entry[1:]) if entry and isinstance(entry[0], list) else (entry, [])
    new = [_each(token, number) for token in ids]
    if None in new:
        return None
    return [new, *bias] if entry and isinstance(entry[0], list) else new
