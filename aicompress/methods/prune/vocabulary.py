"""Drop tokens that a text, or an alphabet, never uses: their rows leave the embeddings and the head.

Tokens stay that the text uses at least `minimum` times, that are written in the alphabet, or that are named, and all
that the tokenizer needs to come to these (merges of a byte-pair encoding, single characters, pieces of bytes, special
tokens). A text that needs no other token is tokenized as before, and the model
computes the same numbers for it. (Trimming of Abdaoui et al. 2020, arXiv:2010.05609, for any tokenizer.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_serializer
from torch import Tensor

from aicompress.disk import expanded
from aicompress.errors import RecipeError
from aicompress.methods.prune.units import units
from aicompress.methods.structural import StructuralConfig, StructuralMethod, Structure, Unit


class TokenFile(BaseModel):
    """A file that names tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = Field(description="text file of tokens or words, one a line")

    @field_serializer("text", when_used="json")
    def _recorded(self, path: str) -> str:
        return Path(path).name  # where it lies on this machine is nobody's who reads the recipe in a checkpoint


@dataclass(frozen=True)
class Tokens(Unit):
    """Tokens of a tokenizer.

    Attributes:
        alphabet: scripts and ranges of characters whose tokens stay.
        keep: tokens and words that stay.
        file: a file of such, or None.
    """

    plural: ClassVar[str] = "tokens"
    alphabet: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    file: str | None = None


class VocabularyConfig(StructuralConfig):
    """Parameters of vocabulary. The recipe's `calibration:` is the text whose tokens stay, all of it by default."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"alphabet": ["latin"]}, {"tokens": 8192, "multiple": 64}, {"minimum": 2}]}
    )

    name: Literal["vocabulary"] = "vocabulary"
    alphabet: tuple[str, ...] = Field(
        (),
        description="tokens of these characters stay: Unicode scripts or categories (latin, greek, currency_symbol), "
        "ranges (а-я, U+0400-U+04FF), and always punctuation, and ASCII but for its letters",
    )
    keep: tuple[str, ...] | TokenFile = Field(
        (), description="tokens that stay, or words whose tokens do: a list, or {text: FILE} with one a line"
    )
    minimum: int = Field(1, ge=1, description="how often the text uses a token that stays for it")
    tokens: int | None = Field(
        None,
        ge=1,
        description="how many tokens stay, whatever `minimum` says: those of the alphabet first, and of them the most "
        "frequent of the text, or else those that the tokenizer learned first",
    )
    multiple: int = Field(
        1, ge=1, description="round the number of tokens up to a multiple, which kernels like, with the next frequent"
    )

    def relative_to(self, folder: Path) -> VocabularyConfig:
        """The same with the path of its file made absolute."""
        if not isinstance(self.keep, TokenFile):
            return self
        path = str((folder / expanded(self.keep.text)).resolve())
        return self.model_copy(update={"keep": TokenFile(text=path)})


def tokens_of(config: VocabularyConfig) -> Tokens:
    """The tokens that a config asks for by name."""
    if isinstance(config.keep, TokenFile):
        return Tokens(config.alphabet, (), config.keep.text)
    return Tokens(config.alphabet, config.keep)


def sizes(structures: Sequence[Structure], config: VocabularyConfig) -> list[int]:
    """How many tokens stay; of a table of fewer tokens, those of them that it holds.

    Raises:
        RecipeError: fewer than must stay, or nothing says which stay.
    """
    scores = _scores(structures[0])
    counted = bool(((scores >= 1) & torch.isfinite(scores)).any())
    if not (counted or config.alphabet or config.keep or config.tokens):
        hint = "give a text (calibration: {text: FILE}), an alphabet, tokens to keep, or how many tokens stay"
        raise RecipeError("nothing says which tokens stay", hint)
    most, least = structures[0].size, int(torch.isinf(scores).sum())
    wanted = int((scores >= config.minimum).sum()) if config.tokens is None else config.tokens
    if wanted < least:
        raise RecipeError(
            f"method.tokens: {least:,} tokens must stay (special ones, those of keep, and what the tokenizer needs)",
            f"tokens: {least}, or more",
        )
    size = min(most, -(-wanted // config.multiple) * config.multiple)
    kept = keep(structures[0], size, config)
    return [size, *(sum(token < table.size for token in kept) for table in structures[1:])]


def keep(structure: Structure, size: int, config: VocabularyConfig) -> list[int]:
    """Tokens that stay, ascending: those of highest score."""
    return list(range(size)) if size == structure.size else units.highest(_scores(structure), 1, size)


def _scores(structure: Structure) -> Tensor:
    assert structure.importance is not None  # the driver counts tokens before anything is decided
    return structure.importance


METHOD = StructuralMethod[VocabularyConfig](
    name="vocabulary",
    command="prune",
    summary="drop tokens that a text or an alphabet never uses from embedding, head and tokenizer; loads everywhere",
    when="vocabularies of many languages for a text of one; exact on text that needs no dropped token",
    config=VocabularyConfig,
    unit=tokens_of,
    sizes=sizes,
    keep=keep,
    counts_tokens=True,
)
