"""What says how codes are read moves: scales, real zero points, centroids, factors of columns; also norms and biases.

The end-to-end stage of EfficientQAT (Chen et al. 2024, arXiv:2407.11062, section 3.3), and of WaterSIC's fine-tuning:
codes stay, so that a step needs little memory and what is stored stays as small. A learning rate is relative to the
size of what it moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from aicompress.methods.modes import NOTHING, WHOLE, Mode, ModeConfig, StudentParameter, real_suffixes


class Config(ModeConfig):
    """Parameters of scales."""

    name: Literal["scales"] = "scales"


def moves(parameter: StudentParameter, config: Config) -> frozenset[str]:
    """Scales and tables of codes, and vectors."""
    if parameter.weight is None:
        return WHOLE if parameter.is_vector else NOTHING
    return parameter.weight.scale_suffixes() & real_suffixes(parameter.weight)


def check(parameters: Sequence[StudentParameter], config: Config) -> tuple[str, str] | None:
    """Refuse a student without codes."""
    if any(moves(parameter, config) for parameter in parameters if not parameter.is_vector):
        return None
    return "no layer of the student is stored as codes with scales", "quantize it first, or take mode: full"


MODE = Mode(
    "scales",
    "scales and centroids of codes, norms and biases move; codes stay",
    Config,
    moves=moves,
    check=check,
    when="quantized students, minutes; `codes` where there is time, `norms` where there is none",
)
