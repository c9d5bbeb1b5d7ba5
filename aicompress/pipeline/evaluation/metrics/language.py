"""Language models: perplexity, and the distance of a compressed model's predictions from its baselines'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from aicompress.errors import CheckpointError
from aicompress.model.blocks.input_errors import accepting
from aicompress.pipeline.evaluation.metrics.intervals import Estimate, exponential, window_mean

LOGITS = 1 << 24  # logits of one model that are held at a time: 64 MiB in float32
ROWS = 256  # positions that are compared at a time
Progress = Callable[[str, int, int], None]  # what, done, total
Forward = Callable[[Tensor], Tensor]  # ids (batch, tokens) -> logits (batch, tokens, vocabulary)


@dataclass
class _Sums:
    """Means per window of one model, and of its distance from the tested one."""

    nll: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)


def language_figures(
    model: nn.Module,
    baselines: Sequence[nn.Module],
    windows: Tensor,
    kl_samples: int | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> list[dict[str, Estimate]]:
    """Perplexity, and per baseline KL(baseline ‖ model) in nats per token and how often both predict the same token.

    Every window stands alone: its first token is context only, all others are predicted, so 400 windows of 256 tokens
    give exp of the mean negative log-likelihood over 102,000 tokens. No token is added at a window's beginning. One
    batch of logits per model is held at a time.

    Args:
        model: the checkpoint that is judged.
        baselines: what it is compared with, possibly nothing.
        windows: (samples, length) int64.
        kl_samples: windows on which models are compared, from the first; None means all.
        seed: of the bootstrap.
        progress: called with ("perplexity", windows done, all windows).

    Returns:
        Figures against each baseline; one entry, perplexity alone, where there is none.

    Raises:
        CheckpointError: a model gives no logits over a vocabulary, or vocabularies differ.
    """
    models = [forward(each) for each in (model, *baselines)]
    sums = [_Sums() for _ in models]
    limit = len(windows) if kl_samples is None else min(kl_samples, len(windows))
    start = 0
    width = 1  # the first window tells the size of the vocabulary
    while start < len(windows):
        batch = windows[start : start + width]
        vocabulary = _batch(models, batch, sums, max(0, min(limit - start, len(batch))))
        start += len(batch)
        progress("perplexity", start, len(windows))
        width = max(1, LOGITS // (windows.shape[1] * vocabulary))
    return _figures(sums, windows.shape[1] - 1, seed)


def forward(model: nn.Module) -> Forward:
    """Logits of a causal language model.

    Raises (when called):
        CheckpointError: the model gives none.
    """
    device = next(model.parameters()).device

    def run(ids: Tensor) -> Tensor:
        with accepting("evaluation text"):
            output = model(input_ids=ids.to(device), use_cache=False)
        logits = getattr(output, "logits", None)
        if logits is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
            kind = type(model).__name__
            raise CheckpointError(
                f"{kind} gives no logits for every token", "perplexity is measured on causal language models"
            )
        return logits  # type: ignore[no-any-return]

    return run


@torch.inference_mode()
def _batch(models: Sequence[Forward], ids: Tensor, sums: Sequence[_Sums], compared: int) -> int:
    """Add one batch to every model's means; the first `compared` windows also to the distances."""
    tested = models[0](ids)[:, :-1]
    targets = ids[:, 1:].to(tested.device)
    sums[0].nll.append(_nll(tested, targets))
    for run, into in zip(models[1:], sums[1:], strict=True):
        base = run(ids)[:, :-1].to(tested.device)
        if base.shape != tested.shape:
            raise CheckpointError(
                f"the vocabularies differ: {tested.shape[-1]} and {base.shape[-1]} tokens",
                "compare with the checkpoint it was made from",
            )
        into.nll.append(_nll(base, targets))
        if compared:
            kl, same = _distance(base[:compared], tested[:compared])
            into.kl.append(kl)
            into.same.append(same)
    return tested.shape[-1]


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of each window, (batch,) float64."""
    batch, length = targets.shape
    parts = [
        nn.functional.cross_entropy(rows.float(), wanted, reduction="none")
        for rows, wanted in zip(_pieces(logits.flatten(0, 1)), _pieces(targets.flatten()), strict=True)
    ]
    return torch.cat(parts).double().view(batch, length).mean(1).cpu()


def _distance(base: Tensor, tested: Tensor) -> tuple[Tensor, Tensor]:
    """KL(base ‖ tested) and top-1 agreement of each window, (batch,) float64 each."""
    batch, length, _ = base.shape
    kl: list[Tensor] = []
    same: list[Tensor] = []
    for wanted, found in zip(_pieces(base.flatten(0, 1)), _pieces(tested.flatten(0, 1)), strict=True):
        log_p, log_q = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
        # Equal logits must give exactly 0, and a token that both exclude (-inf - -inf) adds nothing.
        terms = torch.where(log_p == log_q, 0.0, log_p.exp() * (log_p - log_q))
        kl.append(terms.sum(-1, dtype=torch.float64))
        same.append((wanted.argmax(-1) == found.argmax(-1)).double())
    shape = (batch, length)
    return torch.cat(kl).view(shape).mean(1).cpu(), torch.cat(same).view(shape).mean(1).cpu()


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    """At most ROWS at a time, so that float32 copies stay small."""
    return torch.split(rows, ROWS)


def _figures(sums: Sequence[_Sums], predicted: int, seed: int) -> list[dict[str, Estimate]]:
    """Estimates from the means of all windows, each of `predicted` tokens."""
    perplexities = []
    for each in sums:
        nll = torch.cat(each.nll)
        perplexities.append(exponential(window_mean(nll, len(nll) * predicted, seed)))
    found = []
    for base, perplexity in zip(sums[1:], perplexities[1:], strict=True):
        kl, same = torch.cat(base.kl), torch.cat(base.same)
        tokens = len(kl) * predicted
        found.append(
            {
                "perplexity": perplexities[0].beside(perplexity),
                "kl": window_mean(kl, tokens, seed),
                "top1_agreement": window_mean(same, tokens, seed),
            }
        )
    return found or [{"perplexity": perplexities[0]}]
