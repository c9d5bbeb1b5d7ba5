"""One sparsity shared by several layers: every layer's own number of survivors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.layer import Layer
from aicompress.methods.capabilities import Candidate
from aicompress.methods.prune.masks.masks import global_cut, kept_count, tile_sums
from aicompress.methods.prune.masks.sparsity import SparsityConfig, present, ranked
from aicompress.methods.zeros import mask_of

S = TypeVar("S", bound=SparsityConfig)


def share_globally(
    candidates: Sequence[Candidate[S]],
    configs: Sequence[S],
    pieces: Callable[[Candidate[S], S], Sequence[Callable[[], Tensor]]],
) -> list[S]:
    """The weights of least score among all layers with `scope: global` go, whatever layer they are in.

    Args:
        candidates: every selected layer, with the config as given.
        configs: their configs so far.
        pieces: (candidate, config) -> functions that give its scores, non-negative, comparable between layers; each is
            called up to twice, in order.

    Raises:
        RecipeError: several global sparsities or blocks, or a layer would be pruned away.
    """
    resolved = list(configs)
    numbers = [n for n, config in enumerate(resolved) if config.scope == "global" and config.kept is None]
    if not numbers:
        return resolved
    shares = {(resolved[n].sparsity, resolved[n].block) for n in numbers}
    if len(shares) > 1:
        shown = sorted({str(sparsity) for sparsity, _ in shares})
        raise RecipeError(
            f"scope: global is given with sparsities {shown}",
            "all layers share one: give one; levels have budgets of their own",
        )
    ((sparsity, _),) = shares
    assert sparsity is not None
    high, wide = resolved[numbers[0]].tile
    total = sum(candidates[n].info.shape[0] * candidates[n].info.shape[1] for n in numbers) // (high * wide)
    kept = kept_count(total, sparsity)
    counts = _counts([pieces(candidates[n], resolved[n]) for n in numbers], kept)
    gone = [candidates[n].info.name for n, count in zip(numbers, counts, strict=True) if count == 0]
    if gone:
        raise RecipeError(
            f"a global sparsity of {sparsity} would prune all of {', '.join(gone[:5])}",
            "lower it, exclude those layers, or use scope: layer",
        )
    for number, count in zip(numbers, counts, strict=True):
        update = {"sparsity": None, "kept": count * high * wide, "scope": "layer"}
        resolved[number] = resolved[number].model_copy(update=update)
    return resolved


def _counts(layers: Sequence[Sequence[Callable[[], Tensor]]], kept: int) -> list[int]:
    """How many of the largest scores each layer has, from the pieces of every layer."""
    if not kept:
        return [0] * len(layers)
    counts = iter(global_cut([piece for pieces in layers for piece in pieces], kept).counts)
    return [sum(next(counts) for _ in pieces) for pieces in layers]


def by_blocks(
    scores: Callable[[Layer, S], Tensor],
) -> Callable[[Candidate[S], S], Sequence[Callable[[], Tensor]]]:
    """The pieces of `share_globally`, one for each block of rows.

    Args:
        scores: (layer, config) -> (out, in), of a weight by itself, whatever else is in its layer.
    """

    def pieces(candidate: Candidate[S], config: S) -> Sequence[Callable[[], Tensor]]:
        return [partial(_competing, read, config, scores) for read in candidate.parts]

    return pieces


def _competing(read: Callable[[], Layer], config: S, scores: Callable[[Layer, S], Tensor]) -> Tensor:
    layer = read()
    there = present(layer)
    ordered = ranked(scores(layer, config), there)
    if mask_of(layer.stored) is not None and config.block is None:
        return ordered[there]  # the others are gone already
    return tile_sums(ordered, config.tile)
