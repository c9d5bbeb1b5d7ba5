"""Everything that is stored as real numbers moves: weights, factors, scales, norms and biases. Codes and masks stay."""

from __future__ import annotations

from typing import Literal

from aicompress.methods.modes import WHOLE, Mode, ModeConfig, StudentParameter, real_suffixes
from aicompress.weights import Weight


class Config(ModeConfig):
    """Parameters of full."""

    name: Literal["full"] = "full"


def moves(parameter: StudentParameter, config: Config) -> frozenset[str]:
    """All real tensors."""
    return WHOLE if parameter.weight is None else real_suffixes(parameter.weight)


def relative(weight: Weight) -> frozenset[str]:
    """Scales; tables of values move as weights do."""
    return frozenset(suffix for suffix in weight.specs() if suffix.endswith("scale"))


MODE = Mode(
    "full",
    "all real numbers move; codes and masks stay",
    Config,
    moves=moves,
    relative=relative,
    when="smaller networks, and compressed ones where there is time; `scales` moves less of a quantized one",
)
