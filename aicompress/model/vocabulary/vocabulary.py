"""The tokens of a tokenizer: what holds them together, in which order they would be kept, their alphabet, and which
token of another tokenizer each is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import regex
import torch
from torch import Tensor

from aicompress.errors import CheckpointError, RecipeError
from aicompress.model.vocabulary.segmentation import Segmentation, segmentation_of

AHEAD = 2.0**30  # uses by which tokens that are asked for are ahead of others; more than a text has
SLOW_HINT = "save it as a fast tokenizer first: tokenizer.json beside the weights"


@dataclass(frozen=True)
class Vocabulary:
    """All tokens of a tokenizer.

    Attributes:
        ids: of every token, added ones included.
        added: tokens beside the algorithm's own, and special ones; they stay.
        segmentation: how the others come about.
        is_word: whether a text comes to the algorithm whole and unchanged.
    """

    ids: Mapping[str, int]
    added: frozenset[str]
    segmentation: Segmentation
    is_word: Callable[[str], bool]

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """The tokens of a Hugging Face tokenizer.

        Raises:
            CheckpointError: it is not made with the tokenizers library, or of a kind that is not known.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise CheckpointError(f"{type(tokenizer).__name__} is a tokenizer in Python, not pruned", SLOW_HINT)
        described = json.loads(backend.to_str())
        added = {token["content"] for token in described.get("added_tokens", [])} | set(tokenizer.all_special_tokens)

        def is_word(text: str) -> bool:
            plain = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
            if backend.pre_tokenizer is None:
                return bool(plain == text)
            return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(plain)] == [text]

        return cls(tokenizer.get_vocab(), frozenset(added), segmentation_of(described), is_word)

    @property
    def fixed(self) -> set[int]:
        """Tokens that stay whatever goes: added and special ones, and those that the algorithm needs."""
        return {self.ids[token] for token in (*self.added, *self.segmentation.required()) if token in self.ids}

    def written(self, spelled: Callable[[str], bool]) -> set[int]:
        """Tokens of some characters, without those that no text gives, such as BERT's [unused0]."""
        texts = ((token, number, self.segmentation.text(token)) for token, number in self.segmentation.ids.items())
        return {number for token, number, text in texts if text and spelled(text) and self._is_given(token)}

    def _is_given(self, token: str) -> bool:
        """Whether a text can give a token; where that is not known, it can."""
        return not self.segmentation.divides_words or self.is_word(self.segmentation.bare(token))

    @cached_property
    def _by_length(self) -> list[str]:
        """Tokens of the algorithm, those of most characters first."""
        bare = self.segmentation.bare
        return sorted(self.segmentation.ids, key=lambda token: len(bare(token)), reverse=True)

    @cached_property
    def _needs(self) -> dict[str, tuple[str, ...]]:
        ids = self.segmentation.ids
        return {token: tuple(part for part in self.segmentation.needs(token) if part in ids) for token in ids}

    def scores(self, counts: Tensor, stays: Iterable[int], preferred: Iterable[int] = ()) -> Tensor:
        """What a token's place among all is decided by, (tokens,) float64, no two alike but those that must stay.

        A token counts at least as much as any that needs it, so that those above any threshold need no other. Among
        equals the one that was learned first comes first.

        Args:
            counts: (tokens,) how often each is used.
            stays: tokens that must stay; they count without end.
            preferred: tokens that stay before all others.
        """
        scores = counts.double().clone()
        scores[[token for token in preferred if token < len(scores)]] += AHEAD
        scores[[token for token in stays if token < len(scores)]] = math.inf
        values, ids = scores.tolist(), self.segmentation.ids
        for token in self._by_length:
            own = values[ids[token]] if ids[token] < len(values) else math.inf
            for part in self._needs[token]:
                if ids[part] < len(values):
                    values[ids[part]] = max(values[ids[part]], own)
        known = torch.zeros(len(values), dtype=torch.bool)
        known[[number for number in self.ids.values() if number < len(values)]] = True
        scores = torch.tensor(values, dtype=torch.float64)
        scores[~known & (scores == 0)] = -1  # rows of no token
        return scores + self._head_start(len(values))

    def _head_start(self, size: int) -> Tensor:
        """Parts of 1 by which a token is ahead of another that is used as often, (tokens,) float64."""
        order: dict[str, tuple[bool, float]] = {}
        for token in reversed(self._by_length):
            own = (not self._is_given(token), self.segmentation.rank(token))
            order[token] = max([own, *(order[part] for part in self._needs[token])])
        placed = sorted(order, key=order.__getitem__)  # among equals shorter ones come first, as in `order`
        start = 0.25 - torch.arange(size, dtype=torch.float64) / (4 * size)
        for place, token in enumerate(placed):
            if self.segmentation.ids[token] < size:
                start[self.segmentation.ids[token]] = 0.25 + 0.5 * (1 - place / len(placed))
        return start


def unknown_tokens(own: Any, other: Any) -> list[str]:
    """The tokens of a tokenizer that another one has not."""
    known = other.get_vocab()
    return [token for token in own.get_vocab() if token not in known]


def numbers_among(own: Any, other: Any) -> Tensor | None:
    """Another tokenizer's number of every token of one, (tokens,) int64; None where some number is of no token.

    The other one has to know all of them.
    """
    ids, known = own.get_vocab(), other.get_vocab()
    numbers = torch.full((max(ids.values()) + 1,), -1)
    for token, number in ids.items():
        numbers[number] = known[token]
    return None if bool((numbers < 0).any()) else numbers


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
