"""Perplexity of language models, and the distance of a compressed model's predictions from its baselines'."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor, nn

from aicompress.data.section import Data
from aicompress.metrics.intervals import exponential, window_mean
from aicompress.metrics.metric import Estimate, FigureSpec, MeasuredFigures, Metric
from aicompress.metrics.outputs import NO_TOKEN, TokenLogits

ROWS = 256  # positions that are compared at a time


class Perplexity(Data):
    """Text of which a language model predicts every token of a window but the first.

    An encoder-decoder predicts `labels`, with `field` for its encoder; of text without them, the second half of a
    window from the first.
    """

    kl_samples: int | None = Field(
        None, ge=1, description="windows on which to compare with a baseline, from the first; none means all"
    )


@dataclass
class _Means:
    """Means per window of one model, and of its distance from the tested one, with the tokens that they are of."""

    nll: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)


def measure(batches: Iterable[TokenLogits], config: Perplexity, seed: int) -> MeasuredFigures:
    """Measure perplexity and, per baseline, KL(baseline ‖ model) in nats per token and the share of equal predictions.

    Every window stands alone: of a decoder's its first token is context only, all others are predicted, so 400 windows
    of 256 tokens give exp of the mean negative log-likelihood over 102,000 tokens.
    """
    models: list[_Means] = []
    windows = 0
    for batch in batches:
        models = models or [_Means() for _ in batch.logits]
        count = len(batch.targets)
        compared = count if config.kl_samples is None else min(max(0, config.kl_samples - windows), count)
        _add(batch, models, compared)
        windows += count
    return MeasuredFigures(
        tuple(_perplexity(each, seed) for each in models),
        tuple(_agreement(each, seed) for each in models[1:]),
    )


def _add(batch: TokenLogits, models: list[_Means], compared: int) -> None:
    """Add one batch to every model's means; the first `compared` windows also to the distances."""
    targets = batch.targets
    tested, *baselines = batch.logits
    for logits, means in zip((tested, *baselines), models, strict=True):
        means.nll.append(_nll(logits, targets))
        means.tokens.append((targets != NO_TOKEN).sum(1).cpu())
    for logits, means in zip(baselines, models[1:], strict=True):
        if compared:
            kl, same = _distance(logits[:compared], tested[:compared], targets[:compared] != NO_TOKEN)
            means.kl.append(kl)
            means.same.append(same)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean negative log-likelihood of each window, (batch,) float64."""
    parts = [
        nn.functional.cross_entropy(rows.float(), tokens, reduction="none", ignore_index=NO_TOKEN)
        for rows, tokens in zip(_pieces(logits.flatten(0, 1)), _pieces(targets.flatten()), strict=True)
    ]
    return _mean(torch.cat(parts), targets != NO_TOKEN)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted tokens of each window, zero without any, of values (batch * tokens): (batch,) float64."""
    return (values.double().view(counted.shape) * counted).sum(1).div(counted.sum(1).clamp(min=1)).cpu()


def _distance(base: Tensor, tested: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Compute KL(base ‖ tested) and top-1 agreement of each window, (batch,) float64 each."""
    kl: list[Tensor] = []
    same: list[Tensor] = []
    for base_rows, tested_rows in zip(_pieces(base.flatten(0, 1)), _pieces(tested.flatten(0, 1)), strict=True):
        log_p, log_q = base_rows.float().log_softmax(-1), tested_rows.float().log_softmax(-1)
        # Equal logits must give exactly 0, and a token that both exclude (-inf - -inf) adds nothing.
        terms = torch.where(log_p == log_q, 0.0, log_p.exp() * (log_p - log_q))
        kl.append(terms.sum(-1, dtype=torch.float64))
        same.append((base_rows.argmax(-1) == tested_rows.argmax(-1)).double())
    return _mean(torch.cat(kl), counted), _mean(torch.cat(same), counted)


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    """Split into at most ROWS rows, so that float32 copies stay small."""
    return torch.split(rows, ROWS)


def _perplexity(means: _Means, seed: int) -> dict[str, Estimate]:
    return {"perplexity": exponential(window_mean(torch.cat(means.nll), torch.cat(means.tokens), seed))}


def _agreement(means: _Means, seed: int) -> dict[str, Estimate]:
    kl, same = torch.cat(means.kl), torch.cat(means.same)
    tokens = torch.cat(means.tokens)[: len(kl)]
    return {"kl": window_mean(kl, tokens, seed), "top1_agreement": window_mean(same, tokens, seed)}


METRIC = Metric(
    "perplexity", "language models, also behind an encoder; with a baseline also KL and top-1 agreement", Perplexity,
    reads=TokenLogits,
    figures=(
        FigureSpec("perplexity", "lower"),
        FigureSpec("kl", "lower", compared=True),
        FigureSpec("top1_agreement", "higher", compared=True),
    ),
    measure=measure,
)  # fmt: skip
