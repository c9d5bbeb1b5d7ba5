"""Sentence encoders: agreement with people's scores, and with a baseline's embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from aicompress.pipeline.evaluation.metrics.intervals import (
    Estimate,
    Floats,
    pairwise_correlation,
    rank_correlation,
    window_mean,
)

Encode = Callable[[Sequence[str]], Tensor]  # sentences -> embeddings (sentences, width)


def similarity_figures(
    encode: Encode, baselines: Sequence[Encode], first: Sequence[str], second: Sequence[str], scores: Tensor
) -> list[dict[str, Estimate]]:
    """Spearman's correlation of cosine similarities with people's scores, and with the baseline's similarities.

    Args:
        first, second: the two sentences of each pair.
        scores: (pairs,) how similar people found them.

    Returns:
        Figures against each baseline; one entry, `similarity` alone, where there is none.
    """
    cosines = [_pair_cosines(each, first, second) for each in (encode, *baselines)]
    judged = [rank_correlation(cosine, scores.double().numpy()) for cosine in cosines]
    found = []
    for cosine, score in zip(cosines[1:], judged[1:], strict=True):
        agreement = rank_correlation(cosines[0], cosine)
        found.append({"similarity": judged[0].beside(score), "similarity_agreement": agreement})
    return found or [{"similarity": judged[0]}]


def embedding_figures(
    encode: Encode, baselines: Sequence[Encode], sentences: Sequence[str], seed: int = 0
) -> list[dict[str, Estimate]]:
    """How far a baseline's embeddings of plain sentences are kept; nothing where there is no baseline.

    `embedding_agreement` is Spearman's correlation between the cosine similarities of all pairs of sentences under both
    models; `embedding_cosine` the mean cosine between the two embeddings of a sentence, where they are equally wide.
    """
    mine = unit_rows(encode(sentences))
    ours = (mine @ mine.t()).numpy()
    found = []
    for baseline in baselines:
        theirs = unit_rows(baseline(sentences))
        figures = {"embedding_agreement": pairwise_correlation(ours, (theirs @ theirs.t()).numpy())}
        if theirs.shape == mine.shape:
            figures["embedding_cosine"] = window_mean((mine * theirs).sum(1), len(sentences), seed, "sentences")
        found.append(figures)
    return found


def unit_rows(embeddings: Tensor) -> Tensor:
    """Rows scaled to length 1, float64; a zero row stays zero."""
    return torch.nn.functional.normalize(embeddings.double().cpu(), dim=1)


def _pair_cosines(encode: Encode, first: Sequence[str], second: Sequence[str]) -> Floats:
    """Cosine similarity of each pair; a sentence that stands in several pairs is encoded once."""
    texts = sorted({*first, *second})
    place = {text: number for number, text in enumerate(texts)}
    rows = unit_rows(encode(texts))
    one, other = (rows[[place[text] for text in side]] for side in (first, second))
    cosines: Floats = np.asarray((one * other).sum(1))
    return cosines
