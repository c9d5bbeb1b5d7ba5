"""Which token of one tokenizer is which of another: after tokens are pruned, those that stay have other numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
