"""Embedding: how far a sentence encoder keeps a baseline's embeddings of plain sentences."""

from __future__ import annotations

from collections.abc import Iterable

from aicompress.data.section import Data
from aicompress.metrics.correlation import pairwise_correlation, unit_rows
from aicompress.metrics.intervals import sample_mean
from aicompress.metrics.metric import Estimate, FigureSpec, MeasuredFigures, Metric, Problem
from aicompress.metrics.outputs import SentenceEmbeddings

PAIRED = 2000  # sentences of which all pairs are compared


def measure(batches: Iterable[SentenceEmbeddings], config: Data, seed: int) -> MeasuredFigures:
    """Measure the agreement with each baseline.

    `embedding_agreement` is Spearman's correlation between the cosine similarities of all pairs of sentences under both
    models; `embedding_cosine` the mean cosine between the two embeddings of a sentence, where they are equally wide.
    """
    (outputs,) = batches
    tested, *baselines = (unit_rows(each) for each in outputs.embeddings)
    similarities = (tested @ tested.t()).numpy()
    against: list[dict[str, Estimate]] = []
    for baseline in baselines:
        figures = {"embedding_agreement": pairwise_correlation(similarities, (baseline @ baseline.t()).numpy())}
        if baseline.shape == tested.shape:
            figures["embedding_cosine"] = sample_mean((tested * baseline).sum(1), seed, "sentences")
        against.append(figures)
    return MeasuredFigures(tuple({} for _ in outputs.embeddings), tuple(against))


def check(samples: int, config: Data) -> Problem | None:
    """Refuse more sentences than all pairs can be compared of: pairs grow with the square of the samples."""
    if samples <= PAIRED:
        return None
    return f"quality.embedding compares all pairs of sentences, {samples} are too many", f"samples: {PAIRED}"


METRIC = Metric(
    "embedding", "sentence encoders: plain sentences, compared with a baseline", Data, reads=SentenceEmbeddings,
    figures=(
        FigureSpec("embedding_agreement", "higher", compared=True),
        FigureSpec("embedding_cosine", "higher", compared=True),
    ),
    measure=measure, check=check,
)  # fmt: skip
