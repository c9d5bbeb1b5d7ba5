"""How layers share out a budget, or a divergence, as ranks: what several of them, or their values, decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from aicompress.errors import CompressError, RecipeError, raise_all
from aicompress.methods.capabilities import Candidate
from aicompress.methods.factorize.budget.ranks import Spectrum, allocate, largest_rank, within_divergence
from aicompress.methods.factorize.budget.sizes import (
    Gains,
    R,
    check,
    dense_nbytes,
    energy_rank,
    factor_nbytes,
    resolved_rank,
    step,
)


@dataclass
class _Wanted:
    """Layers, by their number among the candidates, by what decides on their ranks.

    Attributes:
        other_bytes: of everything that is decided.
        ranks: those that are known.
        read: what further ranks gain, of layers that share something.
        pool: bytes of a share of the parameters, of layers that have it together.
        budgets: layers by `target_bytes`.
        bounds: layers by `max_kl`.
    """

    other_bytes: int
    ranks: dict[int, int] = field(default_factory=dict)
    read: dict[int, Gains] = field(default_factory=dict)
    pool: dict[int, int] = field(default_factory=dict)
    budgets: dict[int, list[int]] = field(default_factory=dict)
    bounds: dict[float, list[int]] = field(default_factory=dict)

    def add(self, number: int, candidate: Candidate[R], gains: Callable[[Candidate[R]], Gains]) -> None:
        """Read a layer whose singular values decide, and note by what."""
        config, read = candidate.config, gains(candidate)
        if config.energy is not None:
            wanted, multiple = energy_rank(read.squares, config.energy), config.multiple or 1
            self.decide(number, candidate, -(-wanted // multiple) * multiple)
            return
        self.read[number] = read
        if config.target_bytes is not None:
            self.budgets.setdefault(config.target_bytes, []).append(number)
        elif config.max_kl is not None:
            self.bounds.setdefault(config.max_kl, []).append(number)
        else:
            self.pool[number] = _nbytes(candidate)
            self.other_bytes += self.pool[number]

    def decide(self, number: int, candidate: Candidate[R], rank: int) -> None:
        self.ranks[number] = rank
        self.other_bytes += _nbytes(candidate, rank)


def resolve(
    candidates: Sequence[Candidate[R]],
    other_bytes: int,
    gains: Callable[[Candidate[R]], Gains],
    divergence: Callable[[Sequence[R]], float] | None = None,
) -> list[R]:
    """Turn `energy`, `target_bytes`, `max_kl` and a `keep` of all layers together into ranks; layers are read once.

    Args:
        candidates: the layers.
        other_bytes: of everything else in the output.
        gains: reads a layer and says what its ranks gain.
        divergence: explicit configs -> KL of the model's outputs; None while it cannot be measured: the largest ranks
            stand for those that `max_kl` will give.

    Raises:
        RecipeError: the budget does not hold even rank 1 everywhere, or a compressed layer would grow.
    """
    wanted = _Wanted(other_bytes)
    for number, candidate in enumerate(candidates):
        if not candidate.config.by_spectrum:
            wanted.other_bytes += _nbytes(candidate)
        elif candidate.config.tried and divergence is None:
            wanted.decide(number, candidate, _largest(candidate))
        else:
            wanted.add(number, candidate, gains)
    require_one(wanted.budgets, wanted.bounds)
    gained, ranks = in_one_unit(candidates, wanted.read), wanted.ranks
    spectra = {number: spectrum(candidates[number], squares) for number, squares in gained.items()}
    if wanted.pool:
        layers = [spectra[number] for number in wanted.pool]
        ranks.update(zip(wanted.pool, allocate(layers, sum(wanted.pool.values())), strict=True))
    for budget, numbers in wanted.budgets.items():
        layers = [spectra[number] for number in numbers]
        ranks.update(zip(numbers, allocate(layers, budget - wanted.other_bytes, budget), strict=True))
    for limit, numbers in wanted.bounds.items():

        def lost(tried: Sequence[int], numbers: Sequence[int] = numbers) -> float:
            assert divergence is not None
            return divergence(explicit(candidates, {**ranks, **dict(zip(numbers, tried, strict=True))}))

        tried = within_divergence([spectra[number] for number in numbers], limit, lost)
        ranks.update(zip(numbers, tried, strict=True))
    return explicit(candidates, ranks)


def require_one(budgets: Mapping[int, object], bounds: Mapping[float, object]) -> None:
    """Refuse several budgets, or bounds, of one output.

    Raises:
        RecipeError: there are.
    """
    if len(budgets) > 1:
        hint = "it is the size of the whole output: give one; levels have budgets of their own"
        raise RecipeError("target_bytes is given with several values", hint)
    if len(bounds) > 1 or (bounds and budgets):
        what = "several values" if len(bounds) > 1 else "target_bytes beside it"
        raise RecipeError(f"max_kl is given with {what}", "it bounds what the whole model loses: give it alone, once")


def _largest(candidate: Candidate[R]) -> int:
    """The largest rank whose factors are smaller than the matrix; the full one where there is none."""
    multiple = step(candidate.info, candidate.config)
    return largest_rank(candidate.info.shape) // multiple * multiple or min(candidate.info.shape)


def in_one_unit(candidates: Sequence[Candidate[Any]], read: Mapping[int, Gains]) -> dict[int, Tensor]:
    """Gains by the number of the layer; those that are not comparable are brought to the average per weight."""
    numbers = {at: candidates[at].info.shape[0] * candidates[at].info.shape[1] for at in read}
    known = [at for at, each in read.items() if each.comparable]
    average = sum(float(read[at].squares.sum()) for at in known) / max(1, sum(numbers[at] for at in known))
    spectra: dict[int, Tensor] = {}
    for at, each in read.items():
        total = float(each.squares.sum())
        factor = average * numbers[at] / total if known and not each.comparable and total > 0 else 1.0
        spectra[at] = (each.squares * factor).cpu()
    return spectra


def explicit(candidates: Sequence[Candidate[R]], ranks: dict[int, int]) -> list[R]:
    """Each layer's config, with its rank where one was found.

    Raises:
        RecipeError: a compressed layer would grow.
    """
    decided = dict.fromkeys(type(candidates[0].config).one_of) if candidates else {}
    resolved = [
        candidate.config.model_copy(update={**decided, "rank": ranks[number]}) if number in ranks else candidate.config
        for number, candidate in enumerate(candidates)
    ]
    problems = (check(candidate.info, config) for candidate, config in zip(candidates, resolved, strict=True))
    raise_all([_refusal(problem) for problem in problems if problem is not None])
    return resolved


def still_open(candidates: Sequence[Candidate[R]], estimates: Sequence[R], opened: Callable[[R], bool]) -> list[R]:
    """Configs with an estimated rank that keep what a survey will decide by, where it will."""
    return [
        candidate.config.model_copy(update={"rank": config.rank}) if opened(candidate.config) else config
        for candidate, config in zip(candidates, estimates, strict=True)
    ]


def _refusal(problem: tuple[str, str]) -> CompressError:
    return RecipeError(*problem)


def _nbytes(candidate: Candidate[R], rank: int | None = None) -> int:
    rank = rank or resolved_rank(candidate.info, candidate.config)
    return min(factor_nbytes(candidate.info, rank), dense_nbytes(candidate.info))


def spectrum(candidate: Candidate[R], gains: Tensor) -> Spectrum:
    """What a layer gains by each rank, and what it pays."""
    info = candidate.info
    return Spectrum(gains, factor_nbytes(info, 1), dense_nbytes(info), step(info, candidate.config))
