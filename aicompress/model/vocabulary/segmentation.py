"""How a tokenizer divides words into tokens, and which of them must stay for others to be found as before.

Each algorithm takes the same choice among fewer tokens as long as the tokens of its choice are there, with all that
led to it:

    WordPiece  the longest token that fits: it is still the longest
    BPE        merges in the order of their ranks: those that make a token stay, with all that they join
    Unigram    the likeliest path: it is still the likeliest; an unknown character costs more than the unlikeliest piece
    WordLevel  words as they are
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

from aicompress.errors import CheckpointError

SPACE = "▁"  # stands for a space in pieces
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # pieces of what has no other token


class Segmentation(ABC):
    """An algorithm with its tokens.

    Attributes:
        model: of the tokenizer, as its JSON describes it.
        ids: its tokens, without added ones.
        byte_level: its characters stand for bytes.
        divides_words: a token is a word, or the part of one, as the pre-tokenizer gives it.
    """

    divides_words: ClassVar[bool] = False

    def __init__(self, model: Mapping[str, Any], byte_level: bool) -> None:
        self.model, self.byte_level = model, byte_level
        self.ids = self._ids()

    def _ids(self) -> dict[str, int]:
        return dict(self.model["vocab"])

    def required(self) -> Iterator[str]:
        """Tokens that stay whatever goes."""
        unknown = self.model.get("unk_token")
        if unknown in self.ids:
            yield unknown
        if self.model.get("byte_fallback"):
            yield from (piece for piece in BYTES if piece in self.ids)

    @abstractmethod
    def needs(self, token: str) -> Iterable[str]:
        """Tokens that must stay with a token, each of fewer characters."""

    def bare(self, token: str) -> str:
        """A token without what says where in a word it stands."""
        return token

    def rank(self, token: str) -> float:
        """How early a token was learned; the first ones are the most frequent."""
        return self.ids[token]

    def text(self, token: str) -> str | None:
        """The characters that a token stands for; None where it is no whole characters."""
        if token in BYTES and self.model.get("byte_fallback"):
            return None
        bare = self.bare(token)
        return read_bytes(bare) if self.byte_level else bare.replace(SPACE, " ")


class WordPiece(Segmentation):
    """The longest token that fits, from left to right."""

    divides_words = True

    @property
    def prefix(self) -> str:
        """What begins a token inside a word."""
        return str(self.model.get("continuing_subword_prefix", "##"))

    def needs(self, token: str) -> Iterable[str]:
        """Its characters, so that words which are no token any more can still be spelled."""
        text = self.bare(token)
        spelled = (form for character in text for form in (character, self.prefix + character))
        return [form for form in spelled if form in self.ids] if len(text) > 1 else ()

    def bare(self, token: str) -> str:
        return token.removeprefix(self.prefix)


class WordLevel(Segmentation):
    """Words as they are."""

    def needs(self, token: str) -> Iterable[str]:
        return ()


class Unigram(Segmentation):
    """The likeliest path through pieces with scores."""

    def _ids(self) -> dict[str, int]:
        return {piece: number for number, (piece, _) in enumerate(self.model["vocab"])}

    @cached_property
    def _scores(self) -> dict[str, float]:
        return {piece: float(score) for piece, score in self.model["vocab"]}

    def required(self) -> Iterator[str]:
        """Also the piece of least score, from which that of unknown characters follows."""
        yield from super().required()
        if self.model.get("unk_id") is not None:
            yield self.model["vocab"][self.model["unk_id"]][0]
        yield min(self._scores, key=self._scores.__getitem__)

    def needs(self, token: str) -> Iterable[str]:
        """Its characters, so that words which are no piece any more can still be spelled."""
        return [character for character in token if character in self.ids] if len(token) > 1 else ()

    def rank(self, token: str) -> float:
        return -self._scores[token]


class BytePair(Segmentation):
    """Merges in the order of their ranks."""

    @property
    def prefix(self) -> str:
        """What begins a symbol inside a word."""
        return self.model.get("continuing_subword_prefix") or ""

    @property
    def suffix(self) -> str:
        """What ends the last symbol of a word."""
        return self.model.get("end_of_word_suffix") or ""

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in reversed(list(enumerate(pairs_of(self.model))))}

    @cached_property
    def _makers(self) -> dict[str, list[tuple[str, str]]]:
        """By token, the merges that give it, in the order of their ranks."""
        makers: dict[str, list[tuple[str, str]]] = {}
        for pair in sorted(self._ranks, key=self._ranks.__getitem__):
            makers.setdefault(joined(pair, self.prefix), []).append(pair)
        return makers

    def required(self) -> Iterator[str]:
        """Also every byte of a byte-level encoding."""
        yield from super().required()
        if self.byte_level:
            yield from (character for character in BYTE_CHARACTERS if character in self.ids)

    def needs(self, token: str) -> Iterable[str]:
        """The two that its last merge joins."""
        makers = self._makers.get(token, [])
        if len(makers) > 1:
            last = self._last_merge(token)
            makers = makers if last is None else [last]
        return [part for pair in makers for part in pair]

    def _last_merge(self, token: str) -> tuple[str, str] | None:
        """The last merge that makes a token of its characters; None where these do not come together as one."""
        symbols, last = self._symbols(token), None
        while len(symbols) > 1:
            ranked = [(self._ranks.get(pair), at) for at, pair in enumerate(pairwise(symbols))]
            known = [(rank, at) for rank, at in ranked if rank is not None]
            if not known:
                return None
            _, at = min(known)
            last = (symbols[at], symbols[at + 1])
            symbols[at : at + 2] = [joined(last, self.prefix)]
        return last if symbols == [token] else None

    def _symbols(self, token: str) -> list[str]:
        """The characters that a token is merged from, as a word begins with them."""
        inside = bool(self.prefix) and token.startswith(self.prefix)
        characters = enumerate(self.bare(token))
        symbols = [one if at == 0 and not inside else self.prefix + one for at, one in characters]
        if token.endswith(self.suffix) and symbols:
            symbols[-1] += self.suffix
        return symbols

    def rank(self, token: str) -> float:
        """The rank of its first merge; characters come before."""
        makers = self._makers.get(token)
        return self._ranks[makers[0]] if makers else -1

    def bare(self, token: str) -> str:
        bare = token.removeprefix(self.prefix)
        return bare.removesuffix(self.suffix) or bare


ALGORITHMS: Mapping[str, type[Segmentation]] = {
    "WordPiece": WordPiece,
    "BPE": BytePair,
    "Unigram": Unigram,
    "WordLevel": WordLevel,
}


def segmentation_of(described: Mapping[str, Any]) -> Segmentation:
    """How a tokenizer divides words.

    Args:
        described: its JSON.

    Raises:
        CheckpointError: by an algorithm that is not known.
    """
    kind = str(described["model"].get("type"))
    if kind not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise CheckpointError(f"its tokenizer is of the kind {kind!r}, whose tokens are not pruned", f"known: {known}")
    parts = [described.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    return ALGORITHMS[kind](described["model"], any(_holds(part, "ByteLevel") for part in parts))


def _holds(part: Any, kind: str) -> bool:
    """Whether a part of a tokenizer, or one inside it, is of a kind."""
    if isinstance(part, list):
        return any(_holds(each, kind) for each in part)
    return isinstance(part, dict) and (part.get("type") == kind or any(_holds(each, kind) for each in part.values()))


def pairs_of(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The merges of a byte-pair encoding in the order of their ranks."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def joined(pair: tuple[str, str], prefix: str) -> str:
    """The token that a merge gives."""
    return pair[0] + pair[1].removeprefix(prefix)


def _byte_characters() -> dict[str, int]:
    """The characters that stand for bytes in byte-level encodings: themselves where they are printed, or from Ā on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTE_CHARACTERS = _byte_characters()


def read_bytes(token: str) -> str | None:
    """The text of a token of a byte-level encoding; None where its bytes are no whole characters."""
    try:
        return bytes(BYTE_CHARACTERS[character] for character in token).decode()
    except (KeyError, UnicodeDecodeError):
        return None
