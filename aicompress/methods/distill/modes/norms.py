"""Norms and biases are corrected in closed form, without gradients, and statistics of batch norms estimated anew.

Every layer in its turn, behind those that are corrected: a bias takes up the mean of what the output has lost (Nagel et
al. 2019, arXiv:1906.04721), a norm gets the gain and shift that give every channel the teacher's spread and mean, and a
batch norm the statistics of what it is given now. Two forward passes over the samples, whatever the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from aicompress.methods.modes import NOTHING, WHOLE, LayerCorrection, Mode, StudentParameter


class Config(LayerCorrection):
    """Parameters of norms."""

    name: Literal["norms"] = "norms"


def moves(parameter: StudentParameter, config: Config) -> frozenset[str]:
    """Vectors."""
    return WHOLE if parameter.is_vector else NOTHING


def check(parameters: Sequence[StudentParameter], config: Config) -> tuple[str, str] | None:
    """Refuse a student without norms and biases."""
    if any(parameter.is_vector for parameter in parameters):
        return None
    return "the student has neither norms nor biases", "take mode: scales, factors or full"


MODE = Mode(
    "norms",
    "norms and biases are corrected in closed form, batch-norm statistics estimated anew",
    Config,
    moves=moves,
    check=check,
    when="seconds, after any compression that keeps the layers; `scales` and `blocks` win back more in minutes",
)
