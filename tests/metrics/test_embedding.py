"""Embeddings of plain sentences against a baseline's."""

import numpy as np
import pytest
import torch

from aicompress.data import Data
from aicompress.metrics import MeasuredFigures
from aicompress.metrics.embedding import METRIC, PAIRED
from aicompress.metrics.outputs import SentenceEmbeddings

DATA = Data(text="unread.txt")


def random_rows(seed: int) -> torch.Tensor:
    return torch.randn(60, 16, generator=torch.Generator().manual_seed(seed))


def measured(*embeddings: torch.Tensor) -> MeasuredFigures:
    return METRIC.measure([SentenceEmbeddings(embeddings)], DATA, 0)


def test_embeddings_of_an_identical_encoder_agree() -> None:
    (figures,) = measured(random_rows(0), random_rows(0)).against
    assert figures["embedding_agreement"].value == pytest.approx(1.0)
    assert figures["embedding_cosine"].value == pytest.approx(1.0)


def test_embeddings_of_a_noisy_encoder_agree_less() -> None:
    rows = random_rows(0)
    near, far = measured(rows, rows + 0.1 * random_rows(1), rows + random_rows(1)).against
    assert 1 > near["embedding_agreement"].value > far["embedding_agreement"].value > 0.2
    assert 1 > near["embedding_cosine"].value > far["embedding_cosine"].value
    assert near["embedding_agreement"].n == 60 * 59 // 2
    assert near["embedding_cosine"].n == 60
    assert near["embedding_cosine"].unit == "sentences"
    assert near["embedding_cosine"].interval == "bootstrap of 60 sentences"


def test_rankings_compare_where_widths_differ() -> None:
    wide = torch.cat([random_rows(0), torch.zeros(60, 4)], dim=1)
    (figures,) = measured(random_rows(0), wide).against
    assert list(figures) == ["embedding_agreement"]
    assert np.isclose(figures["embedding_agreement"].value, 1.0)


def test_a_model_by_itself_has_no_figure() -> None:
    assert METRIC.needs_baseline
    assert measured(random_rows(0)) == MeasuredFigures(({},), ())


def test_more_sentences_than_pairs_can_be_made_of_are_refused() -> None:
    assert METRIC.check(PAIRED, DATA) is None
    problem = METRIC.check(PAIRED + 1, DATA)
    assert problem is not None
    assert problem == ("quality.embedding compares all pairs of sentences, 2001 are too many", "samples: 2000")
