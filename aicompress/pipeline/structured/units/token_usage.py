"""How often texts use each token, and how many of them use one that goes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.data import Data, SampleSource, pairs, sentences, token_stream
from aicompress.data.sampling import record
from aicompress.errors import RecipeError
from aicompress.pipeline.calibration.arguments import generates

BATCH = 4096  # texts that are tokenized together


def token_samples(checkpoint: Checkpoint, data: Data, tokenizer: Any) -> tuple[Iterator[Tensor], SampleSource]:
    """The tokens of every sample of a source: of windows where the model predicts tokens, else of its texts.

    Returns:
        (tokens,) int64 of each sample, and the record of them, which counts texts; of running text its windows.

    Raises:
        RecipeError: the source cannot be read, or holds no texts.
    """
    if data.kind in ("arrays", "drawn"):
        raise RecipeError(f"{data.kind}: tokens are counted in texts", "give text, jsonl, csv, parquet, pairs or hub")
    if data.kind == "pairs":
        first, second, _, source = pairs(data)
        return _of_texts([*first, *second], tokenizer), source
    if not generates(checkpoint):
        texts, source = sentences(data)
        return _of_texts(texts, tokenizer), source
    stream = torch.cat(list(token_stream(data, tokenizer)))
    windows = torch.split(stream, data.length)[: data.samples]
    return iter(windows), record(data, len(windows), len(windows), None)


def _of_texts(texts: list[str], tokenizer: Any) -> Iterator[Tensor]:
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer(texts[start : start + BATCH], add_special_tokens=False, verbose=False)["input_ids"]
        yield from (torch.tensor(ids, dtype=torch.int64) for ids in encoded)


def usage(checkpoint: Checkpoint, data: Data, tokenizer: Any, size: int) -> tuple[Tensor, SampleSource]:
    """How often a source uses each token, (size,) float64, and the record of it.

    Running text, where all of it is taken, counts line by line as well: a tokenizer may begin a text with other tokens
    than a line inside it.

    Raises:
        RecipeError: the source cannot be read, or holds no texts.
    """
    samples, source = token_samples(checkpoint, data, tokenizer)
    counts = _counted(samples, size)
    if data.kind == "text" and data.samples is None and generates(checkpoint):
        texts, _ = sentences(data)
        counts = torch.maximum(counts, _counted(_of_texts(texts, tokenizer), size))
    return counts, source


def _counted(samples: Iterator[Tensor], size: int) -> Tensor:
    counts = torch.zeros(size, dtype=torch.float64)
    while batch := list(islice(samples, BATCH)):
        ids = torch.cat(batch)
        counts += torch.bincount(ids[ids < size], minlength=size)
    return counts


def shares_needing(samples: Iterator[Tensor], gone: Tensor) -> dict[str, float]:
    """How many samples, and how many of their tokens, are of those that go.

    Args:
        samples: (tokens,) int64 each.
        gone: (size,) bool.

    Returns:
        `samples` and `tokens`, shares; `of_samples` and `of_tokens`, how many there are.
    """
    needing = lost = total = count = 0
    for ids in samples:
        dropped = int(gone[ids[ids < len(gone)]].sum())
        needing, lost = needing + bool(dropped), lost + dropped
        total, count = total + len(ids), count + 1
    shares = {"samples": needing / max(count, 1), "tokens": lost / max(total, 1)}
    return {**shares, "of_samples": count, "of_tokens": total}
