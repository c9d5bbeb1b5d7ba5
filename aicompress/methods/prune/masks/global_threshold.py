"""One sparsity shared by several layers: every layer's own number of survivors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.layer import Layer
from aicompress.methods.capabilities import Candidate
from aicompress.methods.prune.masks.masks import global_counts, kept_count, tile_sums
from aicompress.methods.prune.masks.sparsity import SparsityConfig, present, ranked
from aicompress.methods.zeros import mask_of

S = TypeVar("S", bound=SparsityConfig)


def share_globally(
    candidates: Sequence[Candidate[S]], configs: Sequence[S], scores: Callable[[Layer, S], Tensor]
) -> list[S]:
    """The weights of least score among all layers with `scope: global` go, whatever layer they are in.

    Args:
        candidates: every selected layer, with the config as given.
        configs: their configs so far.
        scores: (layer, config) -> (out, in), non-negative, comparable between layers.

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
        raise RecipeError(f"scope: global is given with sparsities {shown}", "all layers share one: give one")
    ((sparsity, _),) = shares
    assert sparsity is not None
    high, wide = resolved[numbers[0]].tile
    total = sum(candidates[n].info.shape[0] * candidates[n].info.shape[1] for n in numbers) // (high * wide)
    kept = kept_count(total, sparsity)
    read = [_reader(candidates[n], resolved[n], scores) for n in numbers]
    counts = global_counts(read, kept) if kept else [0] * len(numbers)
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


def _reader(candidate: Candidate[S], config: S, scores: Callable[[Layer, S], Tensor]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        layer = candidate.read()
        there = present(layer)
        ordered = ranked(scores(layer, config), there)
        if mask_of(layer.stored) is not None and config.block is None:
            return ordered[there]  # the others are gone already
        return tile_sums(ordered, config.tile)

    return read
