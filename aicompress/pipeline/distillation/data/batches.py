"""Samples of a training run, and batches of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from aicompress.data import SampleSource


@dataclass(frozen=True)
class Batch:
    """Some samples, ready for a model.

    Attributes:
        index: (batch,) which samples they are.
        inputs: the model's arguments by name; a model that takes one unnamed tensor has it under "".
        labels: (batch,) int64, or None.
    """

    index: Tensor
    inputs: dict[str, Tensor]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, first: int, step: int) -> Batch:
        """Every so many samples, counted from one of them; padding stays as it is."""
        inputs = {name: tensor[first::step] for name, tensor in self.inputs.items()}
        return Batch(self.index[first::step], inputs, None if self.labels is None else self.labels[first::step])

    def to(self, device: torch.device) -> Batch:
        """The same on a device; `index` stays where it is."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(self.index, inputs, None if self.labels is None else self.labels.to(device))


@dataclass(frozen=True)
class TrainingSamples:
    """All samples of a training run, tokenized.

    Attributes:
        columns: (samples, ...) by argument name, token ids as int32; padded texts have `attention_mask` among them.
        labels: (samples,) int64, -1 where one is not known, or None.
        source: where they came from.
    """

    columns: dict[str, Tensor]
    labels: Tensor | None
    source: SampleSource

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def lengths(self) -> Tensor | None:
        """(samples,) real tokens of padded texts; None where all samples are alike."""
        mask = self.columns.get("attention_mask")
        return None if mask is None else mask.sum(dim=1)

    @property
    def tokens(self) -> int:
        """Real tokens in all samples; 0 where they are no texts."""
        if self.lengths is not None:
            return int(self.lengths.sum())
        ids = self.columns.get("input_ids")
        return 0 if ids is None else ids.numel()

    @cached_property
    def sha256(self) -> str:
        """Digest of what the models are given, in its order."""
        whole = hashlib.sha256()
        labels = {} if self.labels is None else {"labels": self.labels}
        for name, column in sorted({**self.columns, **labels}.items()):
            whole.update(f"{name} {column.dtype} {tuple(column.shape)}".encode())
            whole.update(column.contiguous().numpy().tobytes())
        return whole.hexdigest()

    def batch(self, index: Tensor) -> Batch:
        """A batch of these samples; padding that none of them needs is cut off."""
        picked = {name: _wide(column[index]) for name, column in self.columns.items()}
        mask = picked.get("attention_mask")
        if mask is not None:
            used = mask.any(dim=0)
            picked = {name: column[:, used] for name, column in picked.items()}
        return Batch(index, picked, None if self.labels is None else self.labels[index])


def _wide(column: Tensor) -> Tensor:
    """The column as a model takes it: token ids are kept as int32 and given as int64."""
    return column.long() if column.dtype is torch.int32 else column
