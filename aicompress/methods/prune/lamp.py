"""LAMP: one threshold for all layers, on scores that say how much of its layer's rest a weight is.

Lee et al. 2021, arXiv:2010.07611, equation 4: w² / Σ v² over the layer's weights v with v² ≥ w². Within a layer the
order is that of |w|, so that only each layer's number of survivors differs from magnitude pruning; the largest weight
of a layer has score 1, so that no layer can be pruned away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate, RowWise
from aicompress.methods.decisions import Allocates
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune import magnitude
from aicompress.methods.prune.masks.already_sparse import resolve_stored
from aicompress.methods.prune.masks.global_threshold import share_globally
from aicompress.methods.prune.masks.sparsity import SCORED, SparsityConfig, check, describe, outline
from aicompress.methods.zeros import mask_of
from aicompress.weights import Weight

PIECE = 1 << 20  # squares in float64 at a time
RANGE = 1 << 23  # weights that are sorted at a time
BINS = 1 << 15  # of magnitudes, by the upper 16 bits of a float32 number


class LampConfig(SparsityConfig):
    """Parameters of lamp."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"sparsity": 0.5}, {"sparsity": 0.9, "store": "sparse"}]})
    one_of: ClassVar[tuple[str, ...]] = ("sparsity", "kept")

    name: Literal["lamp"] = "lamp"
    scope: Literal["global"] = Field("global", description="all selected layers share one sparsity")
    pattern: None = Field(None, description="not for lamp, whose layers keep different shares")
    permutation: Literal[0] = Field(0, description="not for lamp, which has no patterns")
    block: None = Field(None, description="not for lamp, whose scores do not add up")


def pieces(candidate: Candidate[LampConfig], config: LampConfig) -> list[Callable[[], Tensor]]:
    """Functions that give the scores w² / Σ_{v² ≥ w²} v² of a layer's weights, called in order, largest weights first.

    A threshold on all layers' scores asks how many of each are above it, not where they are: of a large layer the
    weights of one range of magnitudes are read and sorted at a time. Equal weights count one after the other.
    """
    counts = _histogram(candidate.parts)
    held = [(low, high, int(counts[low:high].sum())) for low, high in ranges(counts)]
    above = {0: 0.0}  # Σ v² of the ranges before each

    def scores(number: int) -> Tensor:
        low, high, size = held[number]
        sizes = torch.empty(size)
        _gather(sizes, candidate.parts, low, high)
        sizes.numpy().sort()  # in place, and without the places, which take twice the weights' own memory
        zeros = int((sizes == 0).sum())
        above[number + 1] = to_shares(sizes, above[number])
        sizes[zeros:].clamp_(min=SCORED)
        return sizes

    return [partial(scores, number) for number in range(len(held))]


def _histogram(parts: Sequence[Callable[[], Layer]]) -> Tensor:
    """How many of a layer's weights lie in each bin of magnitudes, (BINS,)."""
    counts = torch.zeros(BINS, dtype=torch.int64)
    for read in parts:
        for chunk in _magnitudes(read()):
            counts += torch.bincount(_bins(chunk), minlength=BINS)
    return counts


def _magnitudes(layer: Layer) -> Iterator[Tensor]:
    """A layer's magnitudes, a few at a time; of a sparse layer the survivors', since its zeros do not compete."""
    mask = mask_of(layer.stored)
    there = repeat(None) if mask is None else torch.split(mask.reshape(-1), PIECE)
    for chunk, survives in zip(torch.split(layer.weight.reshape(-1), PIECE), there, strict=False):
        yield (chunk if survives is None else chunk[survives]).abs()


def _gather(sizes: Tensor, parts: Sequence[Callable[[], Layer]], low: int, high: int) -> None:
    """Fill with the magnitudes in a range of bins.

    Each piece is copied to its place and dropped: pieces of all sizes, kept until they are joined, leave the allocator
    holes between them, as many as the layer is large.
    """
    filled = 0
    for read in parts:
        for chunk in _magnitudes(read()):
            bins = _bins(chunk)
            found = chunk[(bins >= low) & (bins < high)]
            sizes[filled : filled + len(found)] = found
            filled += len(found)


def _bins(magnitudes: Tensor) -> Tensor:
    return magnitudes.view(torch.int32) >> 16


def ranges(counts: Tensor) -> list[tuple[int, int]]:
    """Ranges of bins, from one to below another, the last first: each holds at most `RANGE` weights, or is one bin."""
    begun, held, end = [], 0, len(counts)
    for at, number in reversed([*enumerate(counts.tolist())]):
        if held and held + number > RANGE:
            begun.append((at + 1, end))
            held, end = 0, at + 1
        held += number
    return [*begun, (0, end)]


def to_shares(sizes: Tensor, above: float = 0.0) -> float:
    """Make of every size what its square is of the sum of the squares from it on, and return the sum of all of them.

    Args:
        sizes: (n,) ascending; overwritten.
        above: the sum of larger squares.
    """
    for end in range(len(sizes), 0, -PIECE):
        piece = sizes[max(0, end - PIECE) : end]
        squares = piece.flip(0).double().square_()
        rest = squares.clone()
        rest[0] += above
        above = float(rest.cumsum_(0)[-1])
        piece.copy_(squares.div_(rest).nan_to_num_(0.0).flip(0))  # 0 / 0 where nothing but zeros is left
    return above


def apply(layer: Layer, config: LampConfig) -> Weight:
    """Prune one layer to its number of survivors."""
    return magnitude.apply(layer, _by_size(config))


def _by_size(config: LampConfig) -> magnitude.MagnitudeConfig:
    """The same number of survivors for magnitude; of a block of rows it may be 0."""
    return magnitude.MagnitudeConfig(kept=1, store=config.store).model_copy(update={"kept": config.kept})


def divided(info: LayerInfo, blocks: Sequence[Callable[[], Layer]], config: LampConfig) -> list[LampConfig]:
    """A config for each block of rows: how many of the layer's survivors lie in it."""
    parts = magnitude.divided(info, blocks, _by_size(config))
    return [config.model_copy(update={"kept": part.kept, "store": part.store}) for part in parts]


def resolve(candidates: Sequence[Candidate[LampConfig]], other_bytes: int) -> list[LampConfig]:
    """Every layer's number of survivors; reads layers up to 3 times, large ones twice for every range and once more.

    Raises:
        RecipeError: several sparsities.
    """
    return share_globally(candidates, resolve_stored(candidates, other_bytes), pieces)


def alike(info: LayerInfo, given: LampConfig, found: Sequence[LampConfig]) -> LampConfig:
    """As many survivors for each of the experts in one tensor as all of them have on average."""
    return found[0].model_copy(update={"kept": max(1, sum(each.kept or 0 for each in found) // len(found))})


METHOD = LayerMethod(
    name="lamp",
    command="prune",
    summary="zero the least weights under one threshold on layer-normalised scores; data-free",
    when="no data, and layers that should lose unlike shares: one threshold for all of them",
    config=LampConfig,
    apply=apply,
    outline=outline,
    check=check,
    row_wise=RowWise(lambda config: True, divided=divided),
    allocates=Allocates(resolve, alike),
    describe=describe,
)
