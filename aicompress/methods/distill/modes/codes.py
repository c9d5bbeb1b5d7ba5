"""Codes move with their scales or centroids, straight through the rounding, and norms and biases beside them.

A latent number stands for each code (Bengio et al. 2013, arXiv:1308.3432, as in quantization-aware training). Going
forward it is its code, so that every held-out loss is that of the codes which would be written. A code of a table is
that of its nearest centroid, as in k-means, and in the discrete step of PV-tuning (arXiv:2405.14852).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from aicompress.methods.distill.latent import latent_suffixes, relaxed
from aicompress.methods.distill.modes import scales
from aicompress.methods.modes import Mode, ModeConfig, StudentParameter, code_rate

# On a language model of 7 million parameters in 2 bits, 200 steps win back 34 % of the divergence with a travel of 0.75
# and 56 % with one of 3; at a rate of 0.1 the loss grows.
TRAVEL, MOST = 3.0, 0.03


class Config(ModeConfig):
    """Parameters of codes."""

    name: Literal["codes"] = "codes"
    rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="how far a step moves a code, in steps of its grid; falls to nothing. By itself 6 / steps, so "
        "that a code can move by three grid steps in all, and at most 0.03",
    )


def moves(parameter: StudentParameter, config: Config) -> frozenset[str]:
    """Codes, scales and tables, and vectors."""
    beside = scales.moves(parameter, scales.Config())
    return beside if parameter.weight is None else beside | latent_suffixes(parameter.weight)


def check(parameters: Sequence[StudentParameter], config: Config) -> tuple[str, str] | None:
    """Refuse a student without codes, or whose codes are all entropy-coded."""
    if any(latent_suffixes(parameter.weight) for parameter in parameters if parameter.weight is not None):
        return None
    unmoved = ("no codes of the student can move: those that are entropy-coded stay", "take mode: scales")
    return scales.check(parameters, scales.Config()) or unmoved


MODE = Mode(
    "codes",
    "codes move straight through the rounding, with scales and centroids, norms and biases",
    Config,
    moves=moves,
    check=check,
    rate=lambda config, steps: code_rate(config.rate, steps, TRAVEL, MOST),
    relax=relaxed,
    when="quantized students of few bits, where there is time; `scales` needs less memory and less data",
)
