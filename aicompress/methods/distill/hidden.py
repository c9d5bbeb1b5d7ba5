"""Hidden states of mapped layers.

    mse          mean over layers of mean((h_s - h_t)²)
    squarehead   mean over layers of mean((h_s - h_t)²) / mean(h_t²)

mse: Jiao et al., "TinyBERT", 2020, equation 8, without the projection, so that widths must agree. squarehead: Kurtic
et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models", 2023, equation 1; it weighs every
layer alike, although later ones have larger states. Student layer m learns from teacher layer g(m) = m L_t / L_s.
Padding does not count.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from aicompress.methods.distill.layers import check_layers, uniform_map
from aicompress.methods.losses import DistillMethod, LossConfig
from aicompress.methods.outputs import Outputs, OutputShapes


class Config(LossConfig):
    """Parameters of hidden."""

    name: Literal["hidden"] = "hidden"
    distance: Literal["squarehead", "mse"] = Field("squarehead", description="squarehead divides by the teacher's size")
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="layers of the student, from 1; 0 is the input of the first; none means all but 0"
    )


def hidden_error(student: Tensor, teacher: Tensor, mask: Tensor | None, distance: str) -> Tensor:
    """Squared error of one layer's hidden states, alone or relative to the teacher's.

    Args:
        student, teacher: (batch, tokens, width).
        mask: (batch, tokens) bool, True for real tokens; None for all.
        distance: mse or squarehead.
    """
    ours, theirs = (states.float() if mask is None else states[mask].float() for states in (student, teacher))
    error = (ours - theirs).square().mean()
    return error / theirs.square().mean() if distance == "squarehead" else error


def loss(student: Outputs, teacher: Outputs, config: Config) -> Tensor:
    """The loss of a batch: the mean over the mapped layers."""
    pairs = uniform_map(config.layers, len(student.hidden) - 1, len(teacher.hidden) - 1)
    terms = [hidden_error(student.hidden[m], teacher.hidden[g], student.mask, config.distance) for m, g in pairs]
    return torch.stack(terms).mean()


def check(student: OutputShapes, teacher: OutputShapes, config: Config) -> tuple[str, str] | None:
    """Both need hidden states of one width."""
    problem = check_layers(student, teacher, config.layers)
    if problem is None and student.width != teacher.width:
        widths = f"{student.width} and {teacher.width} wide"
        return f"the hidden states are {widths}", "relation compares hidden states of different widths"
    return problem


METHOD = DistillMethod(
    "hidden", "distill", "hidden states of mapped layers (TinyBERT 2020, SquareHead 2023)", Config,
    when="students that kept the teacher's width and lost blocks, beside kl; needs a map of layers", loss=loss,
    reads=frozenset({"hidden"}), check=check,
)  # fmt: skip
