"""Texts for encoders and classifiers: sentences, labelled sentences, scored pairs, and padded batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from aicompress.data.rows import FullRows, texts_of
from aicompress.data.sampling import SampleSource, choose, record
from aicompress.data.section import Data
from aicompress.data.text_files import lines
from aicompress.data.tokens import Tokenizer, needed
from aicompress.data.values import plain_text
from aicompress.errors import CheckpointError, RecipeError, suggestion


def sentences(data: Data, seed: int | None = None, most: int | None = None) -> tuple[list[str], SampleSource]:
    """Lines of a text, or the text field of every row, without empty ones: the first `samples`, or a seeded choice.

    Args:
        most: how many are taken of a source that holds more, where the data section does not say.

    Raises:
        RecipeError: the source cannot be read, lacks the field or holds no text.
    """
    rows = None if data.kind == "text" else texts_of(data)
    given = lines(Path(data.path)) if rows is None else _texts(data, rows)
    texts = [text for text in (line.strip() for line in given) if text]
    taken = choose(len(texts), data, seed, most)
    skipped = 0 if rows is None else rows.skipped
    return [texts[index] for index in taken.tolist()], record(data, len(taken), len(texts), seed, skipped)


def _texts(data: Data, rows: FullRows) -> Iterator[str]:
    for where, (value,) in rows:
        yield plain_text(value, f"{data.path}, {where}", data.field)


def labelled(
    data: Data, seed: int | None = None, classes: Sequence[str] = (), most: int | None = None
) -> tuple[list[str], Tensor, SampleSource]:
    """Texts and their labels (samples,) int64 for a classifier.

    Args:
        classes: names of the model's classes in order; a label that is a name is looked up here.
        most: how many are taken of a source that holds more, where the data section does not say.

    Raises:
        RecipeError: the source cannot be read, or a label is neither a whole number nor a known name.
    """
    if data.labels is None:
        raise RecipeError(f"{data.path}: the data section names no `labels`", "labels: the column that holds them")
    if data.kind in ("text", "arrays", "pairs"):
        raise RecipeError(f"{data.path}: {data.kind} hold no labelled texts", "give jsonl, csv, parquet or hub")
    texts: list[str] = []
    labels: list[int] = []
    rows = FullRows(data, [data.field, data.labels])
    for where, (text, label) in rows:
        texts.append(plain_text(text, f"{data.path}, {where}", data.field))
        labels.append(_label(f"{data.path}, {where}", label, classes))
    taken = choose(len(texts), data, seed, most)
    chosen = [texts[index] for index in taken.tolist()]
    return chosen, torch.tensor(labels)[taken], record(data, len(taken), len(texts), seed, rows.skipped)


def targets(data: Data) -> tuple[list[str], list[str], SampleSource]:
    """Texts, and for each the text that is to be written of it, which `labels` names.

    Raises:
        RecipeError: the source cannot be read, holds no rows or lacks a column.
    """
    if data.labels is None or data.kind not in ("jsonl", "csv", "parquet", "hub"):
        raise RecipeError(f"{data.path}: {data.kind} holds no rows with `labels`", "give jsonl, csv, parquet or hub")
    rows = FullRows(data, [data.field, data.labels])
    names = (data.field, data.labels)
    texts = [
        [plain_text(value, f"{data.path}, {where}", name) for value, name in zip(row, names, strict=True)]
        for where, row in rows
    ]
    taken = choose(len(texts), data, None).tolist()
    source = record(data, len(taken), len(texts), None, rows.skipped)
    return [texts[index][0] for index in taken], [texts[index][1] for index in taken], source


def _label(where: str, value: object, classes: Sequence[str]) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise RecipeError(f"{where}: label {value!r} is not a class", "a whole number, or a class name of the model")
    if isinstance(value, int):
        return value
    if value in classes:
        return list(classes).index(value)
    if value.strip().isdecimal() or value.strip() == "-1":  # the latter: not known
        return int(value)
    raise RecipeError(f"{where}: label {value!r} is not a class of the model", suggestion(value, classes))


def pairs(data: Data, seed: int | None = None) -> tuple[list[str], list[str], Tensor, SampleSource]:
    """Sentence pairs and how similar people found them: first, second, scores (samples,) float32.

    Raises:
        RecipeError: the source cannot be read, a row is too short or a score is not a number.
    """
    if data.pairs is None or data.columns is None or data.score is None:
        raise RecipeError(f"{data.path}: {data.kind} hold no sentence pairs", "pairs: file.tsv, with columns and score")
    first: list[str] = []
    second: list[str] = []
    scores: list[float] = []
    rows = FullRows(data, [*data.columns, data.score])
    for where, (one, other, score) in rows:
        first.append(plain_text(one, f"{data.path}, {where}", data.columns[0]))
        second.append(plain_text(other, f"{data.path}, {where}", data.columns[1]))
        try:
            scores.append(float(score))
        except (TypeError, ValueError) as error:
            hint = "check `score`; a header line needs column names"
            raise RecipeError(f"{data.path}, {where}: score {score!r} is not a number", hint) from error
    taken = choose(len(scores), data, seed)
    kept = taken.tolist()
    used = record(data, len(kept), len(scores), seed, rows.skipped)
    return [first[i] for i in kept], [second[i] for i in kept], torch.tensor(scores)[taken], used


def batches(
    texts: Sequence[str], tokenizer: Tokenizer | None, batch_size: int, length: int
) -> Iterator[dict[str, Tensor]]:
    """Texts in their order as padded batches: input_ids, attention_mask and what else the tokenizer gives.

    Each is (batch, tokens) int64.

    Args:
        length: longer texts are cut to this many tokens; a batch is padded to its own longest text.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot pad.
    """
    tokenizer = needed(tokenizer)
    if getattr(tokenizer, "pad_token_id", 0) is None:
        raise CheckpointError(
            "the checkpoint's tokenizer has no padding token", "set pad_token in tokenizer_config.json"
        )
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        encoded = tokenizer(part, padding=True, truncation=True, max_length=length, return_tensors="pt")
        yield dict(encoded.items())
