"""Low-rank factors move in the form that they have, and norms and biases beside them.

Factors are both sides of a low-rank product, also of one that is a correction or a difference to a shared matrix, and
the kernels of a convolution that is several. Of a factor of codes the scales move. What a product is added to stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from aicompress.methods.modes import NOTHING, WHOLE, Mode, ModeConfig, StudentParameter, real_suffixes
from aicompress.weights import Weight
from aicompress.weights.form import within


class Config(ModeConfig):
    """Parameters of factors."""

    name: Literal["factors"] = "factors"


def factor_suffixes(weight: Weight) -> frozenset[str]:
    """Suffixes of the real tensors of all factors in a weight."""
    products = [parts for each in within(weight) if len(parts := each.parts()) > 1]
    factors = [part for parts in products for name, part in parts.items() if name != "base"]
    held = {id(tensor) for factor in factors for tensor in _own(factor)}
    return real_suffixes(weight) & {suffix for suffix, tensor in weight.tensors().items() if id(tensor) in held}


def _own(factor: Weight) -> list[object]:
    """The tensors that a factor is made of."""
    return [value for each in within(factor) for value in vars(each).values()]


def moves(parameter: StudentParameter, config: Config) -> frozenset[str]:
    """Factors, and vectors."""
    if parameter.weight is None:
        return WHOLE if parameter.is_vector else NOTHING
    return factor_suffixes(parameter.weight)


def check(parameters: Sequence[StudentParameter], config: Config) -> tuple[str, str] | None:
    """Refuse a student without factors."""
    if any(moves(parameter, config) for parameter in parameters if not parameter.is_vector):
        return None
    return "no layer of the student is stored as low-rank factors", "factorize it first, or take mode: full"


MODE = Mode(
    "factors",
    "low-rank factors, norms and biases move; all else stays",
    Config,
    moves=moves,
    check=check,
    when="factorized students; `full` moves embeddings and whole matrices too",
)
