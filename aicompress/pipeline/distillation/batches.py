"""Samples of a training run, their split, and batches in an order that seed and step decide."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from aicompress.data import Source, split
from aicompress.errors import RecipeError

BUCKET = 32  # batches whose samples are sorted by length together


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
class Samples:
    """All samples of a training run, tokenized.

    Attributes:
        columns: (samples, ...) by argument name, token ids as int32; padded texts have `attention_mask` among them.
        labels: (samples,) int64, -1 where one is not known, or None.
        source: where they came from.
    """

    columns: dict[str, Tensor]
    labels: Tensor | None
    source: Source

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


@dataclass(frozen=True)
class Split:
    """Which samples are trained on, in which order, and which are held out.

    The order is a function of seed and step, so that a resumed run needs no generator's state.

    Attributes:
        train, held_out: indices, disjoint.
        batch: samples in a step.
        seed: decides the order.
        lengths: (samples,), so that a batch holds texts of like length; None where all are alike.
    """

    train: Tensor
    held_out: Tensor
    batch: int
    seed: int
    lengths: Tensor | None = None

    def at(self, step: int) -> Tensor:
        """(batch,) samples of a step, counted from 0."""
        per_epoch = len(self.train) // self.batch
        epoch, position = divmod(step, per_epoch)
        return _epoch(self, epoch)[position]

    def used(self, steps: int) -> Tensor:
        """Every sample that some step uses, ascending."""
        if steps >= len(self.train) // self.batch:
            return self.train
        return torch.cat([self.at(step) for step in range(steps)]).sort().values

    def first(self, most: int) -> Tensor:
        """The samples of the first steps, as many as are asked for, or all there are."""
        steps = -(-most // self.batch)
        return torch.cat([self.at(step) for step in range(min(steps, len(self.train) // self.batch))])[:most]

    def in_order(self, index: Tensor, batch: int) -> Iterator[Tensor]:
        """The given samples in batches of like length, for passes in which the order does not matter."""
        ordered = index if self.lengths is None else index[self.lengths[index].argsort(stable=True)]
        return iter(torch.split(ordered, batch))

    def __hash__(self) -> int:
        return id(self)


@lru_cache(maxsize=2)
def _epoch(split: Split, epoch: int) -> Tensor:
    """(batches, batch) one pass over the training samples; what does not fill a batch waits for another epoch."""
    generator = torch.Generator().manual_seed(split.seed * 1_000_003 + epoch)
    order = split.train[torch.randperm(len(split.train), generator=generator)]
    count = len(order) // split.batch
    order = order[: count * split.batch]
    if split.lengths is not None:
        lengths = split.lengths
        buckets = torch.split(order, BUCKET * split.batch)
        order = torch.cat([bucket[lengths[bucket].argsort(stable=True)] for bucket in buckets])
    batches = order.view(count, split.batch)
    return batches[torch.randperm(count, generator=generator)]


@dataclass(frozen=True)
class MixedSplit(Split):
    """A split whose every batch holds a fixed number of labelled samples; those without labels are never held out.

    Attributes:
        labelled, unlabelled: the two parts of the training samples, each in an order of its own.
    """

    labelled: Split = field(kw_only=True)
    unlabelled: Split = field(kw_only=True)

    def at(self, step: int) -> Tensor:
        """(batch,) samples of a step, the labelled ones first."""
        return torch.cat([self.labelled.at(step), self.unlabelled.at(step)])

    def used(self, steps: int) -> Tensor:
        """Every sample that some step uses, ascending."""
        return torch.cat([self.labelled.used(steps), self.unlabelled.used(steps)]).sort().values

    __hash__ = Split.__hash__


def mixed(split: Split, labels: Tensor, share: float) -> Split:
    """The split with a share of labelled samples in every batch; the same split where all samples have labels.

    Args:
        split: of all samples.
        labels: (samples,), -1 where there is none.
        share: of a batch.

    Raises:
        RecipeError: too few have labels.
    """
    known = labels >= 0
    if bool(known.all()):
        return split
    number = min(max(1, round(share * split.batch)), split.batch - 1)
    parts = [
        replace(split, train=split.train[known[split.train] == whether], batch=batch)
        for whether, batch in ((True, number), (False, split.batch - number))
    ]
    held_out = split.held_out[known[split.held_out]]
    if not len(held_out) or any(len(part.train) < part.batch or not part.batch for part in parts):
        counts = f"{int(known.sum()):,} samples have labels and {int((~known).sum()):,} have none"
        hint = "training.batch of 2 or more, a larger training.held_out, or another mean_teacher.labelled"
        raise RecipeError(f"{counts}: they fill no batch, or none with labels is held out", hint)
    labelled, unlabelled = parts
    return MixedSplit(
        split.train, held_out, split.batch, split.seed, split.lengths, labelled=labelled, unlabelled=unlabelled
    )


def split_samples(samples: Samples, held_out: float, batch: int, seed: int) -> Split:
    """Split the samples into those to train on and a share held out.

    Raises:
        RecipeError: what is left does not fill one batch.
    """
    train, held = split(len(samples), held_out, seed)
    if len(train) < batch:
        raise RecipeError(
            f"{samples.source.path} leaves {len(train)} training samples, a batch takes {batch}",
            f"training.batch: {len(train)}, or more data",
        )
    return Split(train, held, batch, seed, samples.lengths)
