"""How many weights stay of a layer that an earlier step pruned: its mask tells, and no plan made of headers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from aicompress.errors import RecipeError
from aicompress.methods.capabilities import Candidate
from aicompress.methods.prune.masks.sparsity import SparsityConfig, choose, keep_of, present
from aicompress.methods.zeros import mask_of

S = TypeVar("S", bound=SparsityConfig)


def survivors(candidate: Candidate[S]) -> int:
    """How many weights of an already sparse layer stay: its mask decides, no score changes it; reads it once."""
    config = candidate.config
    keep = keep_of(candidate.info.shape, config)
    if keep.group is None and not keep.per_row:
        return min(keep.kept, sum(int(present(read()).sum()) for read in candidate.parts))
    rows = (read() for read in candidate.parts)
    return sum(int(choose(part, torch.ones(part.weight.shape), config).sum()) for part in rows)


def resolve_stored(candidates: Sequence[Candidate[S]], other_bytes: int) -> list[S]:
    """How many weights of already sparse layers stay, which only their masks tell."""
    return counted(candidates, survivors)


def counted(candidates: Sequence[Candidate[S]], count: Callable[[Candidate[S]], int]) -> list[S]:
    """Note in the config of every already sparse layer how many of its weights stay.

    Raises:
        RecipeError: nothing would be left of a layer.
    """
    return [_counted(candidate, count) for candidate in candidates]


def _counted(candidate: Candidate[S], count: Callable[[Candidate[S]], int]) -> S:
    config = candidate.config
    if mask_of(candidate.info.outline) is None or config.scope == "global" or config.block is not None:
        return config
    kept = count(candidate)
    if kept == 0:
        raise RecipeError(
            f"{candidate.info.name}: what it has left would be pruned too", "lower the sparsity, or exclude the layer"
        )
    return config.model_copy(update={"kept": kept})
