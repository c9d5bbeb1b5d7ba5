"""The patterns that a search chooses from, and the configs that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aicompress.layer import LayerInfo
from aicompress.methods.prune.masks.masks import BLOCK, PATTERN

UNSTRUCTURED = "unstructured"

Check = Callable[[LayerInfo, Any], tuple[str, str] | None]


def understood(candidate: str) -> bool:
    """Whether a candidate is N:M, ROWSxCOLUMNS or unstructured."""
    return candidate == UNSTRUCTURED or bool(PATTERN.fullmatch(candidate) or BLOCK.fullmatch(candidate))


def explicit(config: Any, candidate: str) -> Any:
    """The config with a candidate in the place of the search."""
    fields: dict[str, Any] = {"pattern": None, "block": None, "sparsity": config.searched}
    if PATTERN.fullmatch(candidate):
        fields |= {"pattern": candidate, "sparsity": None}
    elif candidate != UNSTRUCTURED:
        fields |= {"block": candidate}
    return config.model_copy(update={**fields, "candidates": ()})


def fitting(info: LayerInfo, config: Any, check: Check) -> list[Any]:
    """Configs of the candidates that a layer can have, in their order."""
    configs = [explicit(config, candidate) for candidate in config.candidates]
    return [each for each in configs if check(info, each) is None]
