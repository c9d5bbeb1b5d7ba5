from collections.abc import Sequence

import numpy as np
import pytest
import torch

from aicompress.pipeline.evaluation.metrics.intervals import spearman
from aicompress.pipeline.evaluation.metrics.sentences import embedding_figures, similarity_figures

SENTENCES = [f"sentence {number}" for number in range(60)]


class Table:
    """An encoder that knows every sentence's embedding."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = dict(zip(SENTENCES, rows, strict=True))
        self.asked = 0

    def __call__(self, sentences: Sequence[str]) -> torch.Tensor:
        self.asked += len(sentences)
        return torch.stack([self.rows[sentence] for sentence in sentences])


def random_rows(seed: int, width: int = 16) -> torch.Tensor:
    return torch.randn(60, width, generator=torch.Generator().manual_seed(seed))


def test_similarity_is_spearman_of_cosines_and_scores() -> None:
    rows, scores = random_rows(0), torch.rand(30, generator=torch.Generator().manual_seed(9))
    first, second = SENTENCES[:30], SENTENCES[30:]
    (figures,) = similarity_figures(Table(rows), [], first, second, scores)
    cosines = torch.nn.functional.cosine_similarity(rows[:30], rows[30:]).double().numpy()
    assert figures["similarity"].value == pytest.approx(spearman(cosines, scores.double().numpy()))
    assert figures["similarity"].n == 30


def test_similarity_agreement_with_baselines() -> None:
    rows = random_rows(0)
    first, second = SENTENCES[:30], SENTENCES[30:]
    same, other = similarity_figures(
        Table(rows), [Table(rows * 3), Table(random_rows(1))], first, second, torch.arange(30.0)
    )
    assert same["similarity_agreement"].value == pytest.approx(1.0)
    assert abs(other["similarity_agreement"].value) < 0.5
    assert same["similarity"].baseline == pytest.approx(same["similarity"].value)


def test_a_sentence_is_encoded_once() -> None:
    encoder = Table(random_rows(0))
    similarity_figures(encoder, [], SENTENCES[:1] * 20, SENTENCES[1:21], torch.arange(20.0))
    assert encoder.asked == 21


def test_embeddings_of_an_identical_encoder_agree() -> None:
    (figures,) = embedding_figures(Table(random_rows(0)), [Table(random_rows(0))], SENTENCES)
    assert figures["embedding_agreement"].value == pytest.approx(1.0)
    assert figures["embedding_cosine"].value == pytest.approx(1.0)


def test_embeddings_of_a_noisy_encoder_agree_less() -> None:
    rows = random_rows(0)
    near, far = embedding_figures(
        Table(rows), [Table(rows + 0.1 * random_rows(1)), Table(rows + random_rows(1))], SENTENCES
    )
    assert 1 > near["embedding_agreement"].value > far["embedding_agreement"].value > 0.2
    assert 1 > near["embedding_cosine"].value > far["embedding_cosine"].value
    assert near["embedding_agreement"].n == 60 * 59 // 2


def test_rankings_compare_where_widths_differ() -> None:
    wide = torch.cat([random_rows(0), torch.zeros(60, 4)], dim=1)
    (figures,) = embedding_figures(Table(random_rows(0)), [Table(wide)], SENTENCES)
    assert list(figures) == ["embedding_agreement"]
    assert np.isclose(figures["embedding_agreement"].value, 1.0)
