"""Distances between sentence embeddings, and between their similarities inside a batch.

    L = cosine · mean(1 - cos(s_i, t_i)) + mse · mean((s - t)²)
        + similarity · mean_{i≠j}(cos(s_i, s_j) - cos(t_i, t_j))²

Squared error: Reimers and Gurevych, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation",
2020, equation 1. Similarities of a batch: Park et al., "Relational Knowledge Distillation", 2019, and Tung and Mori,
"Similarity-Preserving Knowledge Distillation", 2019; they need no common width.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from aicompress.methods.distill.mse import squared_error
from aicompress.methods.losses import DistillMethod, LossConfig
from aicompress.methods.outputs import Outputs, OutputShapes, wanted


class Config(LossConfig):
    """Parameters of embedding."""

    name: Literal["embedding"] = "embedding"
    cosine: float = Field(1.0, ge=0, description="factor of 1 - cosine to the teacher's embedding")
    mse: float = Field(0.0, ge=0, description="factor of the squared error to the teacher's embedding")
    similarity: float = Field(1.0, ge=0, description="factor of the squared error of similarities inside a batch")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.cosine or self.mse or self.similarity):
            raise ValueError("one of cosine, mse and similarity must be above 0")
        return self


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """mean(1 - cos(s_i, t_i)) of embeddings (batch, width)."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def similarity_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosine similarities of all pairs i ≠ j; 0 for a batch of one.

    Args:
        student, teacher: (batch, width), (batch, another width).
    """
    batch = len(student)
    if batch < 2:
        return student.sum() * 0
    difference = _cosines(student) - _cosines(teacher)  # (batch, batch), zero on the diagonal
    off_diagonal = ~torch.eye(batch, dtype=torch.bool, device=difference.device)
    return difference[off_diagonal].square().mean()


def _cosines(embedding: Tensor) -> Tensor:
    unit = F.normalize(embedding.float(), dim=-1)
    return unit @ unit.t()


def loss(student: Outputs, teacher: Outputs, config: Config) -> Tensor:
    """The loss of a batch."""
    ours, theirs = wanted(student.embedding, "embeddings"), wanted(teacher.embedding, "embeddings")
    terms = [
        factor * distance(ours, theirs)
        for factor, distance in (
            (config.cosine, cosine_distance),
            (config.mse, squared_error),
            (config.similarity, similarity_error),
        )
        if factor
    ]
    return torch.stack(terms).sum()


def check(student: OutputShapes, teacher: OutputShapes, config: Config) -> tuple[str, str] | None:
    """Both need embeddings; of one width unless only similarities are compared."""
    if student.embedding is None or teacher.embedding is None:
        which = "student" if student.embedding is None else "teacher"
        return f"the {which} gives no embeddings", "distil logits by kl or mse"
    if student.embedding != teacher.embedding and (config.cosine or config.mse):
        widths = f"{student.embedding} and {teacher.embedding} wide"
        return f"the embeddings are {widths}", "set method.cosine: 0 and method.mse: 0 to compare similarities only"
    return None


METHOD = DistillMethod(
    "embedding", "distill", "sentence embeddings and their similarities inside a batch", Config,
    when="sentence encoders, whose output is an embedding and no logits", loss=loss,
    reads=frozenset({"embedding"}), check=check,
)  # fmt: skip
