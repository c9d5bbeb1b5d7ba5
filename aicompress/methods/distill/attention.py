"""Divergence between the attention maps of mapped layers.

    L = mean over layers, heads and tokens of KL(A_t ‖ A_s)

A holds the shares that a token gives to all tokens. Wang et al., "MiniLM", 2020, equation 5, at every mapped layer in
place of the last: student layer m learns from teacher layer g(m) = m L_t / L_s. Where the two have unlike numbers of
heads, the mean over heads is compared. Padding does not count.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from aicompress.methods.distill.layers import check_layers, uniform_map
from aicompress.methods.losses import DistillMethod, LossConfig
from aicompress.methods.outputs import Outputs, OutputShapes

LEAST = 1e-8  # a share that is counted as none: causal maps hold exact zeros


class Config(LossConfig):
    """Parameters of attention."""

    name: Literal["attention"] = "attention"
    layers: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="layers of the student, from 1; none means all"
    )


def map_divergence(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """KL(teacher ‖ student) of attention maps, the mean over heads and real tokens, in nats.

    Args:
        student, teacher: (batch, heads, tokens, tokens), rows sum to 1; numbers of heads may differ.
        mask: (batch, tokens) bool, True for real tokens; None for all.
    """
    ours, theirs = student.float(), teacher.float()
    if ours.shape[1] != theirs.shape[1]:
        ours, theirs = ours.mean(dim=1, keepdim=True), theirs.mean(dim=1, keepdim=True)
    terms = theirs * (theirs.clamp(min=LEAST).log() - ours.clamp(min=LEAST).log())
    rows = terms.sum(dim=-1).mean(dim=1)  # (batch, tokens)
    return (rows if mask is None else rows[mask]).mean()


def loss(student: Outputs, teacher: Outputs, config: Config) -> Tensor:
    """The loss of a batch: the mean over the mapped layers."""
    pairs = uniform_map(config.layers, len(student.attention), len(teacher.attention))
    terms = [map_divergence(student.attention[m - 1], teacher.attention[max(g, 1) - 1], student.mask) for m, g in pairs]
    return torch.stack(terms).mean()


def check(student: OutputShapes, teacher: OutputShapes, config: Config) -> tuple[str, str] | None:
    """Both need attention maps."""
    if student.heads is None or teacher.heads is None:
        which = "student" if student.heads is None else "teacher"
        return f"the {which} gives no attention maps", "distil logits by kl or mse"
    return check_layers(student, teacher, config.layers)


METHOD = DistillMethod(
    "attention", "distill", "Kullback-Leibler divergence of attention maps (MiniLM 2020)", Config,
    when="transformer students beside kl or embedding, also of another width; costs memory for every pair of tokens",
    loss=loss, reads=frozenset({"attention"}), check=check,
)  # fmt: skip
