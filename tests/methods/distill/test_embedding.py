"""Losses between sentence embeddings."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from aicompress.methods.distill.embedding import METHOD, Config, cosine_distance, similarity_error
from aicompress.methods.outputs import Outputs, OutputShapes

SQUARE = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # two orthogonal embeddings


def test_cosine_distance_by_hand() -> None:
    # cosines 1 / sqrt 2 and 0
    distance = cosine_distance(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), SQUARE)
    assert float(distance) == pytest.approx(((1 - 0.5**0.5) + 1) / 2)


def test_similarity_error_by_hand() -> None:
    # the student's pair has cosine 3/5, the teacher's 0; both orders count, the diagonal does not
    student = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert float(similarity_error(student, SQUARE)) == pytest.approx(0.36)


def test_similarities_need_no_common_width_and_ignore_rotation() -> None:
    turned = torch.tensor([[0.0, 0.0, 5.0], [-1.0, 0.0, 0.0]])
    assert float(similarity_error(turned, SQUARE)) == pytest.approx(0.0)


def test_a_batch_of_one_has_no_pairs() -> None:
    student = torch.ones(1, 2, requires_grad=True)
    similarity_error(student, SQUARE[:1]).backward()
    torch.testing.assert_close(student.grad, torch.zeros(1, 2))


def test_terms_add_up_with_their_factors() -> None:
    student, teacher = Outputs(embedding=torch.tensor([[1.0, 0.0], [0.6, 0.8]])), Outputs(embedding=SQUARE)

    def value(**factors: float) -> float:
        return float(METHOD.loss(student, teacher, Config(**{"cosine": 0, "mse": 0, "similarity": 0, **factors})))

    parts = 2 * value(cosine=1) + 3 * value(mse=1) + 5 * value(similarity=1)
    assert value(cosine=2, mse=3, similarity=5) == pytest.approx(parts)


def test_all_factors_zero_is_refused() -> None:
    with pytest.raises(ValidationError, match="above 0"):
        Config(cosine=0, mse=0, similarity=0)


def test_widths_that_differ_allow_similarities_only() -> None:
    narrow, wide = OutputShapes(embedding=32), OutputShapes(embedding=48)
    assert METHOD.check(narrow, wide, Config()) is not None
    assert METHOD.check(narrow, wide, Config(cosine=0, similarity=1)) is None


def test_a_model_without_embeddings_is_refused() -> None:
    assert METHOD.check(OutputShapes(classes=10), OutputShapes(embedding=48), Config()) is not None
