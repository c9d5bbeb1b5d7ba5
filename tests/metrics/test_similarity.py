"""Similarities of sentence pairs against people's scores, from embeddings."""

import pytest
import torch

from aicompress.data import Data
from aicompress.metrics import MeasuredFigures
from aicompress.metrics.correlation import spearman
from aicompress.metrics.outputs import PairEmbeddings
from aicompress.metrics.similarity import METRIC

FIRST, SECOND = torch.arange(30), torch.arange(30, 60)


def random_rows(seed: int) -> torch.Tensor:
    return torch.randn(60, 16, generator=torch.Generator().manual_seed(seed))


def measured(scores: torch.Tensor, *embeddings: torch.Tensor) -> MeasuredFigures:
    outputs = PairEmbeddings(scores, FIRST, SECOND, embeddings)
    return METRIC.measure([outputs], Data(pairs="unread.tsv", columns=(1, 2), score=0), 0)


def test_similarity_is_spearman_of_cosines_and_scores() -> None:
    rows, scores = random_rows(0), torch.rand(30, generator=torch.Generator().manual_seed(9))
    figures = measured(scores, rows)
    cosines = torch.nn.functional.cosine_similarity(rows[:30], rows[30:]).double().numpy()
    similarity = figures.alone[0]["similarity"]
    assert similarity.value == pytest.approx(spearman(cosines, scores.double().numpy()))
    assert similarity.n == 30
    assert figures.against == ()


def test_similarity_agreement_with_baselines() -> None:
    rows = random_rows(0)
    figures = measured(torch.arange(30.0), rows, rows * 3, random_rows(1))
    same, other = figures.against
    assert same["similarity_agreement"].value == pytest.approx(1.0)
    assert abs(other["similarity_agreement"].value) < 0.5
    assert figures.alone[1]["similarity"].value == pytest.approx(figures.alone[0]["similarity"].value)
