"""Windows of tokens for language models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from aicompress.data.rows import FullRows, texts_of
from aicompress.data.sampling import SampleSource, choose, record
from aicompress.data.section import Data
from aicompress.data.text_files import pieces
from aicompress.data.values import Messages, messages_of, plain_text
from aicompress.errors import CheckpointError, RecipeError, first_line


class Tokenizer(Protocol):
    """What is called of a Hugging Face tokenizer."""

    eos_token_id: int | None
    all_special_ids: list[int]
    chat_template: Any

    def __call__(self, text: Any, **options: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...


def needed(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer.

    Raises:
        CheckpointError: there is none.
    """
    if tokenizer is None:
        raise CheckpointError("texts are given, and the checkpoint has no tokenizer", "put tokenizer.json beside it")
    return tokenizer


def surrounding(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens that a tokenizer puts before and after a text, as the model was trained to see it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return list(whole[:at]), list(whole[at + len(plain) :])
    return [], []


def token_windows(
    data: Data, tokenizer: Tokenizer | None, seed: int | None = None, most: int | None = None, least: int = 1
) -> tuple[Tensor, SampleSource]:
    """Non-overlapping windows of a text, (samples, length) int64.

    A text file is one sequence; rows are joined by the end-of-text token, or an empty line where there is none. Rows of
    chat messages are written with the tokenizer's chat template, which says itself where they end. Every window begins
    with what the tokenizer puts before a text (BOS), where it does, unless the data section says `bos: false`.
    Without a seed the first `samples` windows are taken (and no more is read than they need), which is how results
    are compared; with a seed a random choice of all windows, which is how calibration samples. Of a text that is too
    short for `least` windows they are as long as it allows, which the record says.

    Args:
        most: windows that are taken of a longer text, where the data section does not say.
        least: windows without which the caller has nothing to do.

    Raises:
        CheckpointError: there is no tokenizer.
        RecipeError: the source cannot be read, or is too short for one sample.
    """
    tokenizer = needed(tokenizer)
    before = torch.tensor(surrounding(tokenizer)[0] if data.bos else [], dtype=torch.int64)
    inner = data.length - len(before)  # tokens of the text in a window
    if inner < 1:
        raise RecipeError(
            f"a window of {data.length} tokens has no room behind {len(before)} of its start", "a greater `length`"
        )
    rows, texts = _texts_of(data, tokenizer)
    enough = data.samples * inner if data.samples is not None and seed is None else None
    parts = _read(texts, before, enough)
    count = sum(map(len, parts))
    shorter = min(inner, count // least)
    if shorter + len(before) < 2:
        raise RecipeError(f"{data.path} holds {count} tokens, too few to predict one from another", "a longer text")
    length = None if shorter == inner else shorter + len(before)
    inner, available = shorter, count // shorter
    windows = torch.cat(parts)[: available * inner].view(available, inner)
    taken = choose(available, data, seed, most)
    windows = torch.cat([before.expand(len(taken), -1), windows[taken]], dim=1)
    source = record(data, len(taken), available, seed, 0 if rows is None else rows.skipped)
    return windows, replace(source, bos=" ".join(tokenizer.convert_ids_to_tokens(before.tolist())), length=length)


def token_stream(data: Data, tokenizer: Tokenizer | None) -> Iterator[Tensor]:
    """The tokens of a whole source piece by piece, as windows are cut from them.

    Raises:
        CheckpointError: there is no tokenizer.
        RecipeError: the source cannot be read.
    """
    return _texts_of(data, needed(tokenizer))[1]


def _texts_of(data: Data, tokenizer: Tokenizer) -> tuple[FullRows | None, Iterator[Tensor]]:
    """The rows of a source, None of a text file, and the tokens of each of its texts."""
    if data.kind == "text":
        return None, _ids_of_pieces(Path(data.path), tokenizer)
    rows = texts_of(data)
    return rows, _ids_of_rows(data, rows, tokenizer)


def _read(texts: Iterator[Tensor], before: Tensor, enough: int | None) -> list[Tensor]:
    """Tokens of texts until there are enough; what a chat template puts before the first of them is left out."""
    parts: list[Tensor] = []
    count = 0
    for part in texts:
        if not parts and len(before) and torch.equal(part[: len(before)], before):
            part = part[len(before) :]
        parts.append(part)
        count += len(part)
        if enough is not None and count >= enough:
            break
    return parts


def _ids_of_pieces(path: Path, tokenizer: Tokenizer) -> Iterator[Tensor]:
    for piece in pieces(path):
        yield _ids(tokenizer, piece)


def _ids_of_rows(data: Data, rows: FullRows, tokenizer: Tokenizer) -> Iterator[Tensor]:
    end = tokenizer.eos_token_id
    separator = _ids(tokenizer, "\n\n") if end is None else torch.tensor([end])
    for where, (value,) in rows:
        place = f"{data.path}, {where}"
        messages = messages_of(value)
        if messages is not None:
            yield _ids(tokenizer, _chat(tokenizer, messages, place, data.field))
        else:
            yield torch.cat([_ids(tokenizer, plain_text(value, place, data.field)), separator])


def _chat(tokenizer: Tokenizer, messages: Messages, place: str, field: str) -> str:
    """Messages as the model was trained to see them.

    Raises:
        CheckpointError: the tokenizer has no chat template.
        RecipeError: the template does not take these messages.
    """
    if not tokenizer.chat_template:
        hint = f"field: {field}.content reads their texts alone"
        raise CheckpointError(f"{place} holds chat messages, and the tokenizer has no chat template", hint)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # whatever a template raises for roles or contents that it does not know
        reason = first_line(error)
        message = f"{place}: the chat template does not take these messages: {reason}"[:300]
        raise RecipeError(message, f"field: {field}.content reads their texts alone") from error


def _ids(tokenizer: Tokenizer, text: str) -> Tensor:
    # verbose: a text longer than the model's context is no mistake here, it is cut afterwards.
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
