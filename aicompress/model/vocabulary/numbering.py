"""The numbers of tokens before and after some of them go: those that stay keep their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


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
