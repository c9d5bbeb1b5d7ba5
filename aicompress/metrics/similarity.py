"""Similarity: how well a sentence encoder's cosine similarities rank sentence pairs as people do."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from aicompress.data.section import Data
from aicompress.metrics.correlation import Floats, rank_correlation, unit_rows
from aicompress.metrics.metric import FigureSpec, MeasuredFigures, Metric
from aicompress.metrics.outputs import PairEmbeddings


def measure(batches: Iterable[PairEmbeddings], config: Data, seed: int) -> MeasuredFigures:
    """Correlate cosine similarities with people's scores, and with a baseline's similarities (Spearman)."""
    (outputs,) = batches
    tested, *baselines = (_pair_cosines(each, outputs.first, outputs.second) for each in outputs.embeddings)
    scores = outputs.scores.double().numpy()
    return MeasuredFigures(
        tuple({"similarity": rank_correlation(cosines, scores)} for cosines in (tested, *baselines)),
        tuple({"similarity_agreement": rank_correlation(tested, cosines)} for cosines in baselines),
    )


def _pair_cosines(embeddings: Tensor, first: Tensor, second: Tensor) -> Floats:
    """Compute the cosine similarity of each pair, (pairs,)."""
    rows = unit_rows(embeddings)
    cosines: Floats = np.asarray((rows[first] * rows[second]).sum(1))
    return cosines


METRIC = Metric(
    "similarity", "sentence encoders: pairs that people scored", Data, reads=PairEmbeddings,
    figures=(FigureSpec("similarity", "higher"), FigureSpec("similarity_agreement", "higher", compared=True)),
    measure=measure,
)  # fmt: skip
