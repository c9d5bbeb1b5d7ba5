"""Masks from scores: exact counts, deterministic ties, any number of layers; shared by every unstructured method.

Scores are non-negative float32: the larger, the more a weight matters. Their bit patterns sort as they do, so that an
exact order statistic takes two counting passes of 16 bits each instead of a sort, and can be found over many layers
without holding them together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PATTERN = re.compile(r"(\d+):(\d+)")
BLOCK = re.compile(r"([1-9]\d*)x([1-9]\d*)")
HIGH = 1 << 15  # values of the upper 16 bits of a non-negative float32
LOW = 1 << 16
CHUNK = 1 << 22  # scores that are counted at once, in integers of 64 bits
SMALL = 16  # groups up to this size are ranked by comparing all pairs


def kept_count(count: int, sparsity: float) -> int:
    """How many of `count` weights stay: count - round(sparsity * count)."""
    return count - round(sparsity * count)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """`2:4` -> (2, 4): 2 of every 4 consecutive inputs are kept.

    Raises:
        ValueError: not N:M with 1 <= N <= M.
    """
    match = PATTERN.fullmatch(pattern)
    kept, group = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= kept <= group:
        raise ValueError(f"pattern {pattern!r} is not N:M, N kept of every M inputs, such as 2:4")
    return kept, group


def parse_block(block: str) -> tuple[int, int]:
    """`4x1` -> (4, 1): 4 outputs of 1 input stay or go together.

    Raises:
        ValueError: not ROWSxCOLUMNS.
    """
    match = BLOCK.fullmatch(block)
    if match is None:
        raise ValueError(f"block {block!r} is not ROWSxCOLUMNS, such as 4x1")
    return int(match[1]), int(match[2])


def _bits(scores: Tensor) -> Tensor:
    """(n,) int32 that sort as the scores do; -0.0 counts as 0.0."""
    return (scores.reshape(-1).float() + 0.0).view(torch.int32)


def _bits_of(read: Callable[[], Tensor]) -> Tensor:
    return _bits(read())


def _crossing(counts: Tensor, kept: int) -> tuple[int, int]:
    """The bin that holds the kept-th largest element, and how many elements lie in bins above it."""
    above = counts.sum() - counts.cumsum(0)  # elements above each bin
    number = int((above >= kept).sum())
    return number, int(above[number])


def top_mask(scores: Tensor, kept: int, threshold: int | None = None) -> Tensor:
    """True for the `kept` largest scores; of equal ones the first in row-major order. Same shape as scores.

    Args:
        scores: non-negative.
        kept: how many.
        threshold: the bits of the least of them, where they are known.
    """
    if kept <= 0 or kept >= scores.numel():
        return torch.full(scores.shape, kept > 0, dtype=torch.bool, device=scores.device)
    bits = _bits(scores)
    if threshold is None:
        threshold = cut([lambda: bits], kept).threshold
    mask = bits > threshold
    ties = (bits == threshold).nonzero().squeeze(1)[: kept - int(mask.sum())]
    mask[ties] = True
    return mask.reshape(scores.shape)


@dataclass(frozen=True)
class SurvivorCut:
    """Where the largest scores of several layers end.

    Attributes:
        threshold: bits of the least of them.
        counts: how many each layer has; of equal scores the first layers' come first.
    """

    threshold: int
    counts: list[int]


@dataclass
class Occurrences:
    """How often each lower half of bits occurs in one layer after another: few of all halves do.

    All layers' are in one array that grows. Small ones would lie amid the large ones that come and go, and keep the
    allocator from giving their memory to the next.
    """

    halves: bytearray = field(default_factory=bytearray)
    numbers: bytearray = field(default_factory=bytearray)
    lengths: list[int] = field(default_factory=list)

    def append(self, counts: Tensor) -> None:
        """Add a layer's, (LOW,)."""
        found = counts.numpy().nonzero()[0]
        self.halves += found.astype(np.uint16).tobytes()
        self.numbers += counts.numpy()[found].astype(np.uint32).tobytes()
        self.lengths.append(len(found))

    def each(self) -> Iterator[tuple[NDArray[np.uint16], NDArray[np.uint32]]]:
        """Every layer's lower halves, and how often each occurs."""
        halves, numbers = np.frombuffer(self.halves, np.uint16), np.frombuffer(self.numbers, np.uint32)
        for end, length in zip(accumulate(self.lengths), self.lengths, strict=True):
            yield halves[end - length : end], numbers[end - length : end]


def cut(read: Sequence[Callable[[], Tensor]], kept: int) -> SurvivorCut:
    """Find the `kept` largest scores of several layers.

    Args:
        read: gives one layer's score bits, int32; each is called twice, and no two results are held at once.
        kept: how many, at least 1.
    """
    high = torch.zeros(HIGH, dtype=torch.int64)
    for bits in read:
        high += _upper_halves(bits())
    bucket, _ = _crossing(high, kept)
    above, within, total = [], Occurrences(), torch.zeros(LOW, dtype=torch.int64)
    for bits in read:
        larger, low = _lower_halves(bits(), bucket)
        above.append(larger)
        within.append(low)
        total += low
    offset, _ = _crossing(total, kept - sum(above))
    counts, equal = [], []
    for larger, (halves, numbers) in zip(above, within.each(), strict=True):
        counts.append(larger + int(numbers[halves > offset].sum()))
        equal.append(int(numbers[halves == offset].sum()))
    left = kept - sum(counts)
    for number, ties in enumerate(equal):
        counts[number] += min(ties, left)
        left -= min(ties, left)
    return SurvivorCut((bucket << 16) | offset, counts)


def _upper_halves(bits: Tensor) -> Tensor:
    """How often each upper half of bits (n,) int32 occurs, (HIGH,)."""
    counts = torch.zeros(HIGH, dtype=torch.int64)
    for part in torch.split(bits, CHUNK):
        counts += torch.bincount(part >> 16, minlength=HIGH).cpu()
    return counts


def _lower_halves(bits: Tensor, bucket: int) -> tuple[int, Tensor]:
    """How many upper halves are above one, and how often each lower half occurs with this one, (LOW,)."""
    above, counts = 0, torch.zeros(LOW, dtype=torch.int64)
    for part in torch.split(bits, CHUNK):
        upper = part >> 16
        above += int((upper > bucket).sum())
        counts += torch.bincount(part[upper == bucket] & 0xFFFF, minlength=LOW).cpu()
    return above, counts


def global_cut(read: Sequence[Callable[[], Tensor]], kept: int) -> SurvivorCut:
    """The same for functions that give scores, non-negative."""
    return cut([partial(_bits_of, scores) for scores in read], kept)


def row_mask(scores: Tensor, kept: int) -> Tensor:
    """True for the `kept` largest scores of every row; of equal ones the first; scores (rows, columns)."""
    columns = scores.shape[-1]
    if kept <= 0 or kept >= columns:
        return torch.full(scores.shape, kept > 0, dtype=torch.bool, device=scores.device)
    threshold = scores.kthvalue(columns - kept + 1, dim=-1, keepdim=True).values
    above, ties = scores > threshold, scores == threshold
    left = kept - above.sum(dim=-1, keepdim=True)
    return above | (ties & (ties.cumsum(dim=-1) <= left))


def pattern_mask(scores: Tensor, kept: int, group: int) -> Tensor:
    """True for the `kept` largest of every `group` consecutive inputs; scores (out, in), group divides in."""
    if group > SMALL:
        return row_mask(scores.reshape(-1, group), kept).reshape(scores.shape)
    places = scores.reshape(-1, group).t().contiguous()  # (group, groups)
    better = torch.zeros(places.shape, dtype=torch.int8, device=scores.device)  # how many of its group beat each
    for one in range(group):
        for other in range(one + 1, group):
            wins = places[one] >= places[other]
            better[other] += wins
            better[one] += ~wins
    return (better < kept).t().reshape(scores.shape)


def tile_sums(scores: Tensor, tile: tuple[int, int]) -> Tensor:
    """Sums over the tiles of a matrix: (rows, columns) -> (rows / high, columns / wide)."""
    if tile == (1, 1):
        return scores
    (high, wide), (rows, columns) = tile, scores.shape
    return scores.reshape(rows // high, high, columns // wide, wide).sum(dim=(1, 3))


@dataclass(frozen=True)
class Keep:
    """How many weights stay, and which of them compete.

    Attributes:
        kept: how many.
        group: (N, M): N of every M consecutive inputs stay; else None.
        tile: (rows, columns) that stay or go together.
        per_row: every row, or row of tiles, keeps the same number.
    """

    kept: int
    group: tuple[int, int] | None = None
    tile: tuple[int, int] = (1, 1)
    per_row: bool = False

    def part(self, rows: int, before: int, through: int, total: int) -> Keep:
        """What stays of the columns that hold the elements `before` to `through` of `total`; all parts add up.

        Args:
            rows: of the matrix.
        """
        unit = self.tile[0] * self.tile[1] * (rows // self.tile[0] if self.per_row else 1)
        kept = self.kept // unit
        return replace(self, kept=(kept * through // total - kept * before // total) * unit)

    def mask(self, scores: Tensor, threshold: int | None = None) -> Tensor:
        """True for the weights that stay; of equal scores the first.

        Args:
            scores: (rows, columns), non-negative and additive over a tile.
            threshold: the bits of the least score that stays, where all compete and it is known.
        """
        if self.group is not None:
            return pattern_mask(scores, *self.group)
        high, wide = self.tile
        kept = self.kept // (high * wide)
        tiles = tile_sums(scores, self.tile)
        mask = row_mask(tiles, kept // tiles.shape[0]) if self.per_row else top_mask(tiles, kept, threshold)
        return mask if self.tile == (1, 1) else mask.repeat_interleave(high, 0).repeat_interleave(wide, 1)
