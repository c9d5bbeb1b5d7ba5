"""How a budget of bytes becomes a rank for every layer, shared by factorizing methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aicompress.errors import RecipeError

TRIES = 6  # of ranks on the running model
CLOSE = 0.95  # of a bound: what is above it is near enough
HALVINGS = 12  # of the bytes in search of a budget


def factor_parameters(shape: tuple[int, int], rank: int) -> int:
    """Numbers in U (out, rank) and V (rank, in)."""
    return rank * (shape[0] + shape[1])


def largest_rank(shape: tuple[int, int]) -> int:
    """The largest rank whose factors have fewer numbers than the matrix; 0 where there is none."""
    return (shape[0] * shape[1] - 1) // (shape[0] + shape[1])


@dataclass(frozen=True)
class Spectrum:
    """What one layer gains by each rank, and what it pays.

    Attributes:
        gains: (min(out, in),) the error that each further rank removes, descending.
        rank_bytes: bytes of one rank.
        dense_bytes: bytes of the dense matrix, which removes all of the error.
        multiple: ranks come in steps of this many.
    """

    gains: Tensor
    rank_bytes: int
    dense_bytes: int
    multiple: int = 1

    @property
    def step_bytes(self) -> int:
        return self.rank_bytes * self.multiple

    @property
    def steps(self) -> int:
        """Steps whose factors are smaller than the dense matrix; at least 0."""
        return min(len(self.gains), (self.dense_bytes - 1) // self.rank_bytes) // self.multiple

    @property
    def least(self) -> int:
        """Bytes that the layer takes at least."""
        return self.step_bytes if self.steps else self.dense_bytes

    def step_gains(self) -> Tensor:
        """(steps,) gains of the steps, descending."""
        return self.gains[: self.steps * self.multiple].reshape(-1, self.multiple).sum(dim=1)


@dataclass(frozen=True, order=True)
class _Move:
    """One step up for a layer: sorted so that the best gain per byte comes first, then by layer and step."""

    price: float  # minus the gain per byte
    layer: int
    before: int  # steps taken before
    after: int  # steps taken after; -1 is dense
    nbytes: int


def _hull(layer: int, spectrum: Spectrum) -> list[_Move]:
    """Steps of a layer up to where the jump to dense gains more per byte than any step, then that jump.

    Factors that cost almost as much as the dense matrix are never worth it: gain over bytes has a cliff there. The
    upper convex hull of the curve and the dense point makes the greedy choice right.
    """
    gains, step = spectrum.step_gains(), spectrum.step_bytes
    held = torch.cat([gains.new_zeros(1), gains.cumsum(0)])[1:]  # after 1, 2, ... steps
    spent = step * torch.arange(1, len(gains) + 1, dtype=torch.float64)
    slope = (spectrum.gains.sum() - held).clamp_min(0) / (spectrum.dense_bytes - spent)
    last = int(slope.argmin())
    moves = [
        _Move(-price, layer, number + 1, number + 2, step)
        for number, price in enumerate((gains[1 : last + 1] / step).tolist())
    ]
    jump = _Move(-float(slope[last]), layer, last + 1, -1, spectrum.dense_bytes - step * (last + 1))
    return [*moves, jump]


def _rest(layer: int, spectrum: Spectrum, taken: int) -> list[_Move]:
    """Single steps beyond those taken, for the bytes that a jump to dense did not fit into."""
    prices = (spectrum.step_gains()[taken:] / spectrum.step_bytes).tolist()
    return [
        _Move(-price, layer, taken + number, taken + number + 1, spectrum.step_bytes)
        for number, price in enumerate(prices)
    ]


def allocate(layers: Sequence[Spectrum], budget: int, named: int | None = None) -> list[int]:
    """Ranks that remove the most error within a budget: greedy by gain per byte over each layer's convex hull.

    Args:
        layers: one spectrum per layer.
        budget: bytes that all of them may take together; never exceeded.
        named: the budget as the user gave it, for the message.

    Returns:
        A rank per layer; the full rank min(out, in) stands for the dense matrix.

    Raises:
        RecipeError: not even the smallest factors fit.
    """
    left = budget - sum(layer.least for layer in layers)
    if left < 0:
        least = (named if named is not None else budget) - left
        raise RecipeError(
            f"target_bytes {named if named is not None else budget} is out of reach: the smallest ranks take {least}",
            f"give at least {least}, or select more layers",
        )
    taken = [1 if layer.steps else -1 for layer in layers]
    moves = sorted(move for n, layer in enumerate(layers) if layer.steps for move in _hull(n, layer))
    left = _spend(moves, taken, left)
    rest = sorted(move for n, layer in enumerate(layers) if taken[n] > 0 for move in _rest(n, layer, taken[n]))
    _spend(rest, taken, left)
    return [
        len(layer.gains) if steps < 0 else steps * layer.multiple for layer, steps in zip(layers, taken, strict=True)
    ]


def _spend(moves: Sequence[_Move], taken: list[int], left: int) -> int:
    """Make every move that continues where its layer stands and fits; returns the bytes that are left."""
    for move in moves:
        if taken[move.layer] == move.before and move.nbytes <= left:
            taken[move.layer] = move.after
            left -= move.nbytes
    return left


def within_divergence(layers: Sequence[Spectrum], limit: float, lost: Callable[[Sequence[int]], float]) -> list[int]:
    """Ranks of fewest bytes whose measured loss is within a limit.

    The bytes lie between those that lost too much and those that did not. The next budget is where what ranks leave
    out, in units of the spectra, would lose the limit if it were in proportion to what has been measured last.

    Args:
        layers: one spectrum per layer.
        limit: what may be lost; never exceeded.
        lost: ranks -> measured loss; those of dense matrices lose nothing.

    Returns:
        A rank per layer; the full rank min(out, in) stands for the dense matrix.
    """
    low, high = sum(layer.least for layer in layers), sum(layer.dense_bytes for layer in layers)
    best = [len(layer.gains) for layer in layers]
    budget = (low + high) // 2
    for _ in range(TRIES):
        ranks = allocate(layers, budget)
        measured = lost(ranks)
        if measured <= limit:
            best, high = ranks, budget
        else:
            low = budget
        if high - low < 2 or CLOSE * limit <= measured <= limit:
            break
        wanted = _dropped(layers, ranks) * (1 + CLOSE) / 2 * limit / measured if measured > 0 else float("inf")
        budget = _budget_that_drops(layers, wanted, low, high)
    return best


def _dropped(layers: Sequence[Spectrum], ranks: Sequence[int]) -> float:
    return sum(float(layer.gains[rank:].sum()) for layer, rank in zip(layers, ranks, strict=True))


def _budget_that_drops(layers: Sequence[Spectrum], wanted: float, low: int, high: int) -> int:
    """Bytes at which about so much is left out, clearly between two bounds, so that these come nearer each other."""
    first, last = low, high
    for _ in range(HALVINGS):
        middle = (first + last) // 2
        if _dropped(layers, allocate(layers, middle)) > wanted:
            first = middle
        else:
            last = middle
    edge = (high - low) // 16
    return min(max(last, low + edge), high - edge)
