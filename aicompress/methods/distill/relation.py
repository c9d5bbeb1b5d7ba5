"""Similarities between the tokens of a sample, in the hidden states of mapped layers.

    L = mean over layers, samples and pairs of tokens of (cos(h_s,i, h_s,j) - cos(h_t,i, h_t,j))²

Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019, with the tokens of one sample in place of the
samples of a batch, as in the token relations of Wang et al., "MiniLM", 2020. The two models may differ in width.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from aicompress.methods.distill.layers import check_layers, uniform_map
from aicompress.methods.losses import DistillMethod, LossConfig
from aicompress.methods.outputs import Outputs, OutputShapes


class Config(LossConfig):
    """Parameters of relation."""

    name: Literal["relation"] = "relation"
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="layers of the student, from 1; 0 is the input of the first; none means all but 0"
    )


def relation_error(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared difference of the cosines of all pairs of real tokens of a sample.

    Args:
        student, teacher: (batch, tokens, width), (batch, tokens, another width).
        mask: (batch, tokens) bool, True for real tokens; None for all.
    """
    difference = _cosines(student) - _cosines(teacher)  # (batch, tokens, tokens)
    if mask is not None:
        difference = difference[mask[:, :, None] & mask[:, None, :]]
    return difference.square().mean()


def _cosines(states: Tensor) -> Tensor:
    unit = F.normalize(states.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def loss(student: Outputs, teacher: Outputs, config: Config) -> Tensor:
    """The loss of a batch: the mean over the mapped layers."""
    pairs = uniform_map(config.layers, len(student.hidden) - 1, len(teacher.hidden) - 1)
    terms = [relation_error(student.hidden[m], teacher.hidden[g], student.mask) for m, g in pairs]
    return torch.stack(terms).mean()


def check(student: OutputShapes, teacher: OutputShapes, config: Config) -> tuple[str, str] | None:
    """Both need hidden states."""
    return check_layers(student, teacher, config.layers)


METHOD = DistillMethod(
    "relation", "distill", "similarities between the tokens of a sample, for any two widths", Config,
    when="students of another width than the teacher, beside embedding or kl", loss=loss,
    reads=frozenset({"hidden"}), check=check,
)  # fmt: skip
