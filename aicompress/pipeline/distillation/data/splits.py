"""Which samples a training run takes, in which order, and which are held out: functions of seed and step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from aicompress.data import split
from aicompress.errors import RecipeError
from aicompress.pipeline.distillation.data.samples import TrainingSamples
from aicompress.pipeline.step.workers import started
from aicompress.recipe.distillation import DistillRecipe, Training

BUCKET = 32  # batches whose samples are sorted by length together


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

    def repeats(self, steps: int) -> bool:
        """Whether so many steps use a sample twice."""
        return steps * self.batch > len(self.used(steps))

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
class TokenSplit(Split):
    """A split whose every step takes as many samples of like length as fit into a number of tokens, padding counted.

    Attributes:
        tokens: in a step at most.
        sizes: (samples,) tokens of each.
    """

    tokens: int = field(kw_only=True)
    sizes: Tensor = field(kw_only=True)

    def at(self, step: int) -> Tensor:
        """(n,) samples of a step, counted from 0; how many an epoch has depends on what lies together."""
        epoch = 0
        while step >= (count := _count(self, epoch)):
            step, epoch = step - count, epoch + 1
        return _by_tokens(self, epoch)[step]

    def used(self, steps: int) -> Tensor:
        """Every sample that some step uses, ascending."""
        if steps >= _count(self, 0):
            return self.train
        return torch.cat([self.at(step) for step in range(steps)]).sort().values

    def first(self, most: int) -> Tensor:
        """The samples of the first steps, as many as are asked for, or all there are."""
        return torch.cat(_by_tokens(self, 0))[:most]

    def repeats(self, steps: int) -> bool:
        """Whether so many steps use a sample twice."""
        return steps > _count(self, 0)

    __hash__ = Split.__hash__


@lru_cache(maxsize=2)
def _by_tokens(split: TokenSplit, epoch: int) -> tuple[Tensor, ...]:
    """One pass over all training samples: neighbours of a drawn order that are alike in length share a batch."""
    generator = torch.Generator().manual_seed(split.seed * 1_000_003 + epoch)
    order = split.train[torch.randperm(len(split.train), generator=generator)]
    together = BUCKET * max(1, split.tokens // int(split.sizes[order].float().mean().ceil()))
    batches: list[list[int]] = []
    for bucket in torch.split(order, together):
        sorted_ones = bucket[split.sizes[bucket].argsort(stable=True)]
        batches.append([])
        for sample, size in zip(sorted_ones.tolist(), split.sizes[sorted_ones].tolist(), strict=True):
            if (len(batches[-1]) + 1) * size > split.tokens:
                batches.append([])
            batches[-1].append(sample)
    places = torch.randperm(len(batches), generator=generator).tolist()
    return tuple(torch.tensor(batches[place]) for place in places)


@cache
def _count(split: TokenSplit, epoch: int) -> int:
    """Steps of an epoch."""
    return len(_by_tokens(split, epoch))


def by_tokens(split: Split, samples: TrainingSamples, tokens: int) -> TokenSplit:
    """The split with steps of so many tokens.

    Raises:
        RecipeError: the samples are no texts, or one takes more.
    """
    ids = samples.columns.get("input_ids")
    if ids is None:
        raise RecipeError("training.batch_tokens counts tokens, and the data has none", "training.batch")
    sizes = torch.full((len(samples),), ids.shape[1]) if samples.lengths is None else samples.lengths
    if (most := int(sizes.max())) > tokens:
        raise RecipeError(
            f"training.batch_tokens: a sample takes {most:,}", f"{most} or more, or a shorter data.length"
        )
    return TokenSplit(split.train, split.held_out, split.batch, split.seed, split.lengths, tokens=tokens, sizes=sizes)


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


def split_of(
    samples: TrainingSamples, training: Training, recipe: DistillRecipe
) -> tuple[Split, Training, tuple[str, ...]]:
    """Which samples are trained on and which are held out, a batch that these fill, and a warning where it is smaller.

    Raises:
        RecipeError: they fill none, or not as a mean teacher or a number of tokens asks.
    """
    parts = training.accumulate * started()
    split = split_samples(samples, training.held_out, training.batch, recipe.seed, parts)
    if training.batch_tokens is not None:
        return by_tokens(split, samples, training.batch_tokens), training, ()
    told: tuple[str, ...] = ()
    if split.batch < training.batch:
        told = (f"a batch takes {split.batch} samples, not {training.batch}: there are {len(split.train)} to train on",)
        training = training.model_copy(update={"batch": split.batch})
    if recipe.mean_teacher is None or samples.labels is None:
        return split, training, told
    return mixed(split, samples.labels, recipe.mean_teacher.labelled), training, told


def split_samples(samples: TrainingSamples, held_out: float, batch: int, seed: int, parts: int = 1) -> Split:
    """Split the samples into those to train on and a share held out; few are one batch.

    Args:
        parts: that divide a batch.

    Raises:
        RecipeError: what is left does not fill one batch.
    """
    train, held = split(len(samples), held_out, seed)
    fitting = min(batch, len(train) // parts * parts)
    if not fitting:
        raise RecipeError(
            f"{samples.source.path} leaves {len(train)} training samples, a batch is divided by {parts}",
            f"training.accumulate: {len(train)}, fewer processes, or more data",
        )
    return Split(train, held, fitting, seed, samples.lengths)
