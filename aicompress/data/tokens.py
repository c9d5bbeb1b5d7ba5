"""Windows of tokens for language models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from aicompress.data.rows import fields, readable
from aicompress.data.sampling import Source, choose, record, wanted_of
from aicompress.data.section import Data
from aicompress.errors import CheckpointError, RecipeError

PIECE = 1 << 22  # characters that are tokenized in one go; a smaller file is tokenized whole


class Tokenizer(Protocol):
    """What is called of a Hugging Face tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: Any, **options: Any) -> Any: ...


def needed(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer.

    Raises:
        CheckpointError: there is none.
    """
    if tokenizer is None:
        raise CheckpointError("texts are given, and the checkpoint has no tokenizer", "put tokenizer.json beside it")
    return tokenizer


def token_windows(
    data: Data, tokenizer: Tokenizer | None, seed: int | None = None, most: int | None = None
) -> tuple[Tensor, Source]:
    """Non-overlapping windows of a text, (samples, length) int64, without special tokens at their ends.

    A text file is one sequence; rows are joined by the end-of-text token, or an empty line where there is none.
    Without a seed the first `samples` windows are taken (and no more is read than they need), which is how results
    are compared; with a seed a random choice of all windows, which is how calibration samples.

    Args:
        most: windows that are taken of a longer text, where the data section does not say.

    Raises:
        CheckpointError: there is no tokenizer.
        RecipeError: the source cannot be read, or is too short for the samples asked for.
    """
    tokenizer = needed(tokenizer)
    enough = data.samples * data.length if data.samples is not None and seed is None else None
    parts: list[Tensor] = []
    count = 0
    for part in _token_parts(data, tokenizer):
        parts.append(part)
        count += len(part)
        if enough is not None and count >= enough:
            break
    available = count // data.length
    wanted = max(1, wanted_of(available, data, most))
    if available < wanted:
        raise RecipeError(
            f"{data.path} holds {count} tokens, {wanted} samples of {data.length} need {wanted * data.length}",
            f"samples: {available}, or a longer text" if available else "a shorter `length`, or a longer text",
        )
    windows = torch.cat(parts)[: available * data.length].view(available, data.length)
    taken = choose(available, data, seed, most)
    return windows[taken], record(data, len(taken), available, seed)


def _token_parts(data: Data, tokenizer: Tokenizer) -> Iterator[Tensor]:
    if data.kind == "text":
        for piece in _pieces(Path(data.path)):
            yield _ids(tokenizer, piece)
        return
    end = tokenizer.eos_token_id
    separator = _ids(tokenizer, "\n\n") if end is None else torch.tensor([end])
    for text in fields(data):
        yield torch.cat([_ids(tokenizer, text), separator])


def _ids(tokenizer: Tokenizer, text: str) -> Tensor:
    # verbose: a text longer than the model's context is no mistake here, it is cut afterwards.
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def _pieces(path: Path) -> Iterator[str]:
    """The text in large pieces that end at a line end, so that memory is bounded and no word is cut."""
    with readable(path), path.open(encoding="utf-8-sig") as file:
        while piece := file.read(PIECE):
            yield piece + file.readline()
