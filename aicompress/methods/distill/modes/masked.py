"""A sparse student is trained inside its masks: all real numbers move, and every zero of a matrix stays zero.

Gradients of zeros are set to zero, so that without moments and decay they never move; sparse forms hold only what is
under their mask, and the mask is written back as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from aicompress.methods.distill.modes import full
from aicompress.methods.modes import Mode, ModeConfig, StudentParameter


class Config(ModeConfig):
    """Parameters of masked."""

    name: Literal["masked"] = "masked"


def moves(parameter: StudentParameter, config: Config) -> frozenset[str]:
    """All real tensors."""
    return full.moves(parameter, full.Config())


def check(parameters: Sequence[StudentParameter], config: Config) -> tuple[str, str] | None:
    """Refuse a student without zeros."""
    if any(parameter.zeros() for parameter in parameters if not parameter.is_vector):
        return None
    return "no weight of the student has zeros to be kept", "prune it first, or take mode: full"


MODE = Mode(
    "masked",
    "all real numbers move; zeros of matrices stay zero",
    Config,
    moves=moves,
    check=check,
    relative=full.relative,
    keeps_zeros=True,
    when="pruned weights, in sparse forms or in dense matrices; `codes` where what is kept is quantized",
)
