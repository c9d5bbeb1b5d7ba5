"""How layers share out bytes, or a divergence, as shares of their own bytes, in steps of a 32nd of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import torch
from pydantic import ByteSize, Field
from torch import Tensor

from aicompress.errors import RecipeError, raise_all
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate
from aicompress.methods.factorize.budget.allocation import in_one_unit, require_one
from aicompress.methods.factorize.budget.ranks import Spectrum, allocate, within_divergence
from aicompress.methods.factorize.budget.sizes import Gains, dense_nbytes
from aicompress.methods.method import MethodConfig

STEPS = 32


class ShareConfig(MethodConfig):
    """Parameters that say which share of its bytes a layer takes."""

    one_of: ClassVar[tuple[str, ...]] = ("keep", "target_bytes", "max_kl")
    budgets: ClassVar[frozenset[str]] = frozenset({"target_bytes"})

    keep: float | None = Field(None, gt=0, le=1, description="share of a layer's bytes; all of them: it stays as it is")
    target_bytes: ByteSize | None = Field(
        None, gt=0, description="weight bytes of the output, in a level of its layers, e.g. 20MB; the least error"
    )
    max_kl: float | None = Field(
        None, gt=0, description="fewest bytes with this divergence of the outputs in nats, tried on calibration data"
    )

    @property
    def shared_out(self) -> bool:
        """Whether several layers decide on the share of each."""
        return self.target_bytes is not None or self.max_kl is not None


S = TypeVar("S", bound=ShareConfig)


@dataclass(frozen=True)
class Curve:
    """What a layer holds at several shares of its bytes.

    Attributes:
        held: the error of a layer of zeros that each share removes.
        whole: that error.
        comparable: in a unit that all layers share; otherwise they count as much as an average layer of its size.
    """

    held: Sequence[float]
    whole: float
    comparable: bool = True


@dataclass(frozen=True)
class Shared(Generic[S]):
    """What a method's layers take and hold at a share of their bytes.

    Attributes:
        nbytes: (layer info, config with `keep`) -> bytes of the stored layer.
        curve: (layer, its config, the same with several `keep`) -> what it holds under each of these.
        check: (layer info, config with `keep`) -> what makes it impossible, as of a method.
    """

    nbytes: Callable[[LayerInfo, S], int]
    curve: Callable[[Layer, S, Sequence[S]], Curve]
    check: Callable[[LayerInfo, S], tuple[str, str] | None]

    def step(self, candidate: Candidate[S]) -> int:
        """Steps that a layer gains at once: the fewest whose multiples all hold what they say; 0 where none does."""
        size = _step_bytes(candidate.info)
        for step in range(1, STEPS // 2 + 1):
            shares = range(step, STEPS, step)
            if all(self.nbytes(candidate.info, _at(candidate.config, share)) <= share * size for share in shares):
                return step
        return 0

    def gains(self, candidate: Candidate[S]) -> Gains:
        """The error that each step of a layer's bytes removes, (STEPS,); with the last one the layer is dense."""
        step = self.step(candidate)
        shares = range(step, STEPS, step) if step else range(0)
        configs = [_at(candidate.config, share) for share in shares]
        curve = self.curve(candidate.read(), candidate.config, configs)
        removed = torch.tensor([0.0, *curve.held], dtype=torch.float64)
        squares = torch.zeros(STEPS, dtype=torch.float64)
        each = (removed[1:] - removed[:-1]).clamp_min(0).sort(descending=True).values / max(1, step)
        squares[: len(shares) * step] = each.repeat_interleave(max(1, step))
        squares[-1] += max(0.0, curve.whole - float(squares.sum()))
        return Gains(squares, curve.comparable)

    def spectrum(self, candidate: Candidate[S], gains: Tensor) -> Spectrum:
        """What a layer gains by each step, and what it pays."""
        step, dense = self.step(candidate), dense_nbytes(candidate.info)
        return Spectrum(gains, _step_bytes(candidate.info) if step else dense, dense, step or 1)


@dataclass
class _Wanted:
    """Layers, by their number among the candidates, by what decides on their shares."""

    other_bytes: int
    shares: dict[int, int] = field(default_factory=dict)
    budgets: dict[int, list[int]] = field(default_factory=dict)
    bounds: dict[float, list[int]] = field(default_factory=dict)


def resolve(
    candidates: Sequence[Candidate[S]],
    other_bytes: int,
    shared: Shared[S],
    divergence: Callable[[Sequence[S]], float] | None = None,
) -> list[S]:
    """Turn `target_bytes` and `max_kl` into a share for every layer; layers are read once.

    Args:
        candidates: the layers.
        other_bytes: of everything else in the output.
        shared: what layers take and hold.
        divergence: explicit configs -> KL of the model's outputs; None while it cannot be measured: the largest shares
            stand for those that `max_kl` will give.

    Raises:
        RecipeError: the budget does not hold the smallest shares, or a compressed layer would grow.
    """
    wanted = _Wanted(other_bytes)
    for number, candidate in enumerate(candidates):
        config = candidate.config
        if config.target_bytes is not None:
            wanted.budgets.setdefault(config.target_bytes, []).append(number)
        elif config.max_kl is not None and divergence is not None:
            wanted.bounds.setdefault(config.max_kl, []).append(number)
        else:
            if config.max_kl is not None:
                wanted.shares[number] = STEPS - 1
                config = _at(config, STEPS - 1)
            wanted.other_bytes += shared.nbytes(candidate.info, config)
    require_one(wanted.budgets, wanted.bounds)
    read = [number for numbers in (*wanted.budgets.values(), *wanted.bounds.values()) for number in numbers]
    gained = in_one_unit(candidates, {number: shared.gains(candidates[number]) for number in read})
    spectra = {number: shared.spectrum(candidates[number], squares) for number, squares in gained.items()}
    shares = wanted.shares
    for budget, numbers in wanted.budgets.items():
        layers = [spectra[number] for number in numbers]
        shares.update(zip(numbers, allocate(layers, budget - wanted.other_bytes, budget), strict=True))
    for limit, numbers in wanted.bounds.items():

        def lost(tried: Sequence[int], numbers: Sequence[int] = numbers) -> float:
            assert divergence is not None
            return divergence(_explicit(candidates, {**shares, **dict(zip(numbers, tried, strict=True))}, shared))

        tried = within_divergence([spectra[number] for number in numbers], limit, lost)
        shares.update(zip(numbers, tried, strict=True))
    return _explicit(candidates, shares, shared)


def _explicit(candidates: Sequence[Candidate[S]], shares: dict[int, int], shared: Shared[S]) -> list[S]:
    """Each layer's config, with its share where one was found.

    Raises:
        RecipeError: a compressed layer would grow.
    """
    resolved = [
        _at(candidate.config, shares[number]) if number in shares else candidate.config
        for number, candidate in enumerate(candidates)
    ]
    problems = (shared.check(candidate.info, config) for candidate, config in zip(candidates, resolved, strict=True))
    raise_all([RecipeError(*problem) for problem in problems if problem is not None])
    return resolved


def still_open(candidates: Sequence[Candidate[S]], estimates: Sequence[S]) -> list[S]:
    """Configs with an estimated share that keep what a survey will decide by."""
    return [
        candidate.config.model_copy(update={"keep": estimate.keep}) if candidate.config.shared_out else estimate
        for candidate, estimate in zip(candidates, estimates, strict=True)
    ]


def _at(config: S, share: int) -> S:
    """A config with a share of 32nds and nothing that is left to decide."""
    return config.model_copy(update={"keep": share / STEPS, "target_bytes": None, "max_kl": None})


def _step_bytes(info: LayerInfo) -> int:
    return -(-dense_nbytes(info) // STEPS)
