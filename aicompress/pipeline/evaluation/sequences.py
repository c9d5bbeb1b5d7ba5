"""Tokens that models predict: windows of a text, masked ones, or sources and targets for an encoder with a decoder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aicompress.data import Data, SampleSource, batches, named_arrays, targets, token_windows
from aicompress.data.tokens import needed, surrounding
from aicompress.errors import CheckpointError, RecipeError
from aicompress.metrics.outputs import NO_TOKEN
from aicompress.pipeline.calibration.arguments import named_arguments
from aicompress.pipeline.step.models.running_model import Running

MASKED = 0.15  # of the tokens of a window


@dataclass(frozen=True)
class Sequences:
    """What a model is given, and what it then predicts.

    Attributes:
        inputs: (samples, ...) by the model's arguments.
        targets: (samples, tokens) int64; NO_TOKEN behind the end of a shorter one.
    """

    inputs: dict[str, Tensor]
    targets: Tensor

    def part(self, start: int, count: int) -> Sequences:
        """Some of the samples."""
        rows = slice(start, start + count)
        return Sequences({name: each[rows] for name, each in self.inputs.items()}, self.targets[rows])

    def same(self, other: Sequences) -> bool:
        """Whether all tokens are equal."""
        mine, theirs = ({**each.inputs, "": each.targets} for each in (self, other))
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def encodes(model: Running) -> bool:
    """Whether a model is an encoder with a decoder, by its configuration."""
    return bool(getattr(getattr(model.module, "config", None), "is_encoder_decoder", False))


def unmasks(model: Running) -> bool:
    """Whether a model is a masked language model: it sees the token that it predicts unless that is masked."""
    return type(model.module).__name__.endswith("ForMaskedLM")


def sequences(models: Sequence[Running], data: Data) -> tuple[Sequences, SampleSource]:
    """Read what models predict, the same for all of them.

    Raises:
        CheckpointError: they divide the text into different tokens, or a decoder is compared with an encoder-decoder.
        RecipeError: the source cannot be read, or holds what they do not predict.
    """
    read, source = _sequences(models[0], data)
    for baseline in models[1:]:
        if not read.same(_sequences(baseline, data)[0]):
            raise CheckpointError(
                f"{baseline.path} divides the text into other tokens than {models[0].path}",
                "compare checkpoints that share a tokenizer",
            )
    return read, source


def _sequences(model: Running, data: Data) -> tuple[Sequences, SampleSource]:
    if not encodes(model):
        return _windows(model, data) if not unmasks(model) else _masked(model, data)
    if "labels" not in inspect.signature(model.module.forward).parameters:
        raise CheckpointError(f"a {type(model.module).__name__} predicts no tokens", "give the model with its head")
    if data.kind == "arrays":
        return _of_arrays(model.module, data)
    return _of_halves(model, data) if data.labels is None else _of_rows(model, data)


def _require_text(model: Running, data: Data) -> None:
    """Refuse what only an encoder with a decoder takes.

    Raises:
        RecipeError: arrays, or rows with labels.
    """
    if data.kind == "arrays" or data.labels is not None:
        told = f"{data.name} is given with `labels`" if data.labels is not None else f"{data.name} holds arrays"
        raise RecipeError(f"{told}, and {model.path} has no encoder to read beside them", "give text alone")


def _windows(model: Running, data: Data) -> tuple[Sequences, SampleSource]:
    """Windows of which a decoder predicts all tokens but the first."""
    _require_text(model, data)
    ids, source = token_windows(data, model.tokenizer)
    return Sequences({"input_ids": ids}, ids[:, 1:]), source


def _masked(model: Running, data: Data) -> tuple[Sequences, SampleSource]:
    """Windows of which a masked language model predicts tokens that are masked, the same of every model (BERT, 3.1)."""
    _require_text(model, data)
    tokenizer: Any = needed(model.tokenizer)
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise CheckpointError(
            f"the tokenizer of {model.path} has no mask token", "set mask_token in tokenizer_config.json"
        )
    before, after = surrounding(tokenizer)
    shorter = data.model_copy(update={"length": max(2, data.length - len(after))})
    ids, source = token_windows(shorter, tokenizer)
    start = len(before) if data.bos else 0
    inner = ids.shape[1] - start
    order = torch.rand(len(ids), inner, generator=torch.Generator().manual_seed(0)).argsort(1)
    hidden = torch.zeros_like(ids, dtype=torch.bool).scatter_(
        1, start + order[:, : max(1, round(MASKED * inner))], True
    )
    end = torch.tensor(after, dtype=torch.int64).expand(len(ids), -1)
    read = torch.cat([ids.masked_fill(hidden, tokenizer.mask_token_id), end], dim=1)
    targets = torch.cat([ids.masked_fill(~hidden, NO_TOKEN), torch.full_like(end, NO_TOKEN)], dim=1)
    return Sequences({"input_ids": read}, targets), source


def _of_halves(model: Running, data: Data) -> tuple[Sequences, SampleSource]:
    """Windows whose first half an encoder reads, as the tokenizer writes a text, and whose second half follows.

    That is prefix language modelling (Raffel et al., JMLR 21, 2020, section 3.2.1), which every such model can be
    asked for, whatever it was trained on.
    """
    ids, source = token_windows(data, model.tokenizer)
    before, after = surrounding(needed(model.tokenizer))
    start = ids[:, : len(before) if data.bos else 0]  # what the tokenizer puts before a text, which decoders write too
    half = ids.shape[1] - (ids.shape[1] - start.shape[1]) // 2
    read = torch.cat([ids[:, :half], torch.tensor(after, dtype=torch.int64).expand(len(ids), -1)], dim=1)
    return Sequences({"input_ids": read}, torch.cat([start, ids[:, half:]], dim=1)), source


def _of_rows(model: Running, data: Data) -> tuple[Sequences, SampleSource]:
    """Texts that an encoder reads, and texts that its decoder is to write, each cut to `length` tokens."""
    texts, written, source = targets(data)
    (inputs,) = batches(texts, model.tokenizer, len(texts), data.length)
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": data.length, "return_tensors": "pt"}
    encoded = needed(model.tokenizer)(None, text_target=written, **options)
    return Sequences(inputs, encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, NO_TOKEN)), source


def _of_arrays(module: Any, data: Data) -> tuple[Sequences, SampleSource]:
    """Arrays that an encoder reads, such as sound or images, and the tokens that its decoder is to write."""
    names = (*data.input_names, *([] if data.labels is None else [data.labels]))
    read, _, source = named_arrays(data.model_copy(update={"inputs": names, "labels": None}))
    labels = read.pop(data.labels or "", None)
    if labels is None or labels.ndim != 2 or labels.is_floating_point():
        raise RecipeError(
            f"{data.name}: an encoder with a decoder predicts `labels`, int64 tokens (samples, tokens)",
            f"labels: the array that holds them, {NO_TOKEN} where a sample has no more",
        )
    return Sequences(named_arguments(module, read), labels), source
