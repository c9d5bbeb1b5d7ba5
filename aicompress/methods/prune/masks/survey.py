"""How much every layer keeps, decided by a survey: the original model's statistics of all layers come before any mask.

One way to decide for all layers: a pattern search, or an allocation of one sparsity (`allocation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.layer import Layer
from aicompress.methods.budget import least_loss
from aicompress.methods.capabilities import Candidate
from aicompress.methods.decisions import Surveys, SurveySetting
from aicompress.methods.prune.masks import allocation
from aicompress.methods.prune.masks.allocation import SparsityShare
from aicompress.methods.prune.masks.calibrated import CalibratedConfig, nbytes, statistics
from aicompress.methods.prune.masks.candidates import fitting
from aicompress.methods.prune.masks.global_threshold import by_blocks, share_globally
from aicompress.methods.prune.masks.masks import kept_count
from aicompress.methods.prune.masks.search import least, losses, saved_bytes
from aicompress.methods.prune.masks.sparsity import check
from aicompress.weights import Weight

K = TypeVar("K", bound=CalibratedConfig)


def surveying(
    apply: Callable[[Layer, K], Weight],
    scores: Callable[[Layer, K], Tensor],
    reads: Callable[[K], frozenset[str]] = statistics,
) -> Surveys[K]:
    """The survey of a method that prunes with calibration.

    Args:
        apply: the method, for losses at explicit sparsities.
        scores: (layer, config) -> (out, in), non-negative: how much each weight matters, comparable between layers.
        reads: config -> statistics that the decision reads.
    """

    def decide(candidates: Sequence[Candidate[K]], setting: SurveySetting) -> list[K]:
        return [
            _explicit(candidate, number)
            for candidate, number in zip(candidates, _decided(candidates, setting, apply, scores), strict=True)
        ]

    return Surveys(reads, decide)


def _explicit(candidate: Candidate[K], number: int) -> K:
    """A layer's config with its number of survivors, or with the pattern of that number among its candidates."""
    config = candidate.config
    if config.open == "search":
        pattern: K = fitting(candidate.info, config, check)[number]
        return pattern
    return config.model_copy(update={"sparsity": None, "kept": number, "allocation": "uniform"})


def _decided(
    candidates: Sequence[Candidate[K]],
    setting: SurveySetting,
    apply: Callable[[Layer, K], Weight],
    scores: Callable[[Layer, K], Tensor],
) -> list[int]:
    """Survivors of every layer, or the number of its pattern.

    Raises:
        RecipeError: the layers do not share one way to decide, or a layer would be pruned away.
    """
    ways = {(candidate.config.open, candidate.config.sparsity) for candidate in candidates}
    if len(ways) > 1:
        shown = ", ".join(f"{way} {sparsity or ''}".strip() for way, sparsity in sorted(ways, key=str))
        raise RecipeError(
            f"layers share a sparsity in several ways: {shown}",
            "give one for all of them; levels have budgets of their own",
        )
    ((way, sparsity),) = ways
    if way == "search":
        return _searched(candidates, setting, apply)
    assert sparsity is not None
    shares = [_share(candidate) for candidate in candidates]
    kept = kept_count(sum(share.size for share in shares), sparsity)
    if way == "owl":
        return _by_outliers(candidates, setting, shares, kept)
    if way == "global":
        configs = [candidate.config.model_copy(update={"scope": "global"}) for candidate in candidates]
        return [config.kept or 0 for config in share_globally(candidates, configs, by_blocks(scores))]
    return _by_losses(candidates, setting, shares, kept, apply)


def _by_outliers(
    candidates: Sequence[Candidate[K]], setting: SurveySetting, shares: Sequence[SparsityShare], kept: int
) -> list[int]:
    """More survivors where more of a block's scores are outliers."""
    config, outlying = candidates[0].config, []
    for number, candidate in enumerate(candidates):
        outlying.append(allocation.outliers(candidate.read(), config.outlier))
        setting.done(number + 1)
    return allocation.by_outliers(shares, outlying, kept, config.spread)


def _by_losses(
    candidates: Sequence[Candidate[K]],
    setting: SurveySetting,
    shares: Sequence[SparsityShare],
    kept: int,
    apply: Callable[[Layer, K], Weight],
) -> list[int]:
    """The survivors of least total loss, each layer's measured at several sparsities."""
    average = kept / sum(share.size for share in shares)
    counts = [allocation.options(share, average) for share in shares]
    measured = []
    for number, (candidate, options) in enumerate(zip(candidates, counts, strict=True)):
        layer = candidate.read()

        def pruned(count: int, candidate: Candidate[K] = candidate, layer: Layer = layer) -> Tensor:
            return apply(layer, _explicit(candidate, count)).dense()

        measured.append(allocation.measured(layer, options, pruned))
        setting.done(number + 1)
    return allocation.by_losses(shares, counts, measured, kept)


def _searched(
    candidates: Sequence[Candidate[K]], setting: SurveySetting, apply: Callable[[Layer, K], Weight]
) -> list[int]:
    """The pattern of least loss per what it saves, layer by layer, or of least total loss within `target_bytes`."""
    target = candidates[0].config.target_bytes
    if target is not None:
        return _within_bytes(candidates, setting, apply, target)
    picks = []
    for number, candidate in enumerate(candidates):
        config = candidate.config
        saved = saved_bytes if config.per == "bytes" else setting.saved_milliseconds
        picks.append(least(candidate.read(), fitting(candidate.info, config, check), apply, saved))
        setting.done(number + 1)
    return picks


def _within_bytes(
    candidates: Sequence[Candidate[K]], setting: SurveySetting, apply: Callable[[Layer, K], Weight], target: int
) -> list[int]:
    """Patterns of least total loss within `target_bytes`, everything else in the output included."""
    costs, lost = [], []
    for number, candidate in enumerate(candidates):
        config = candidate.config
        costs.append([float(size) for size in nbytes(candidate.info, config)])
        lost.append(losses(candidate.read(), fitting(candidate.info, config, check), apply))
        setting.done(number + 1)
    return list(least_loss(costs, lost, float(target - setting.other_bytes)).picks)


def _share(candidate: Candidate[K]) -> SparsityShare:
    config = candidate.config
    (out, columns), (high, wide) = candidate.info.shape, config.tile
    unit = high * wide * (out // high if config.scope == "row" else 1)
    return SparsityShare(out * columns, unit, candidate.info.index)
