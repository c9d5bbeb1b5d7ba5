"""Ranks of layers that share a factor: a group counts as one matrix, its layers one below the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic

from aicompress.methods.capabilities import Candidate
from aicompress.methods.factorize.budget import allocation
from aicompress.methods.factorize.budget.sizes import Gains, R

Groups = Callable[[Sequence[Candidate[R]]], list[list[int]]]


@dataclass(frozen=True)
class _Joined(Candidate[R], Generic[R]):
    """The layers of a group as one.

    Attributes:
        members: the layers.
    """

    members: Sequence[Candidate[R]] = ()


def resolve(
    candidates: Sequence[Candidate[R]],
    other_bytes: int,
    groups: Groups[R],
    gains: Callable[[Sequence[Candidate[R]], R], Gains],
    divergence: Callable[[Sequence[R]], float] | None = None,
) -> list[R]:
    """One rank for all layers of a group, and for each that is in none, as `allocation.resolve` has them.

    Args:
        candidates: the layers.
        other_bytes: of everything else in the output.
        groups: candidates -> the numbers of those that share.
        gains: (layers of a group, config) -> what ranks of their factors gain.
        divergence: explicit configs -> KL of the model's outputs; None while it cannot be measured.

    Raises:
        RecipeError: the budget does not hold even rank 1 everywhere, or a compressed layer would grow.
    """
    shared = groups(candidates)
    alone = sorted(set(range(len(candidates))) - {number for numbers in shared for number in numbers})
    every = [*shared, *([number] for number in alone)]
    joined = [_joined([candidates[number] for number in numbers]) for numbers in every]

    def spread(decided: Sequence[R]) -> list[R]:
        by_number = {number: config for numbers, config in zip(every, decided, strict=True) for number in numbers}
        return [by_number[number] for number in range(len(candidates))]

    def gained(candidate: Candidate[R]) -> Gains:
        members = candidate.members if isinstance(candidate, _Joined) else [candidate]
        return gains(members, candidate.config)

    lost = None if divergence is None else lambda tried: divergence(spread(tried))
    return spread(allocation.resolve(joined, other_bytes, gained, lost))


def _joined(members: Sequence[Candidate[R]]) -> _Joined[R]:
    first = members[0]
    shape = (sum(member.info.shape[0] for member in members), first.info.shape[1])
    info = replace(first.info, shape=shape, nbytes=sum(member.info.nbytes for member in members))
    return _Joined(info, first.config, first.read, members=members)
