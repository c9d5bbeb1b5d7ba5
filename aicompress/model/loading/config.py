"""Read limits and names of a loaded model from its configuration."""

from __future__ import annotations

from typing import Any

from torch import nn


def most_positions(module: nn.Module) -> int | None:
    """Give the most tokens that the model takes; None where its configuration sets no limit, or there is none."""
    config: Any = getattr(module, "config", None)
    return getattr(config, "max_position_embeddings", None) or None


def class_names(module: nn.Module) -> list[str]:
    """List the names of a classifier's classes in their order; none where it has no configuration."""
    config: Any = getattr(module, "config", None)
    names = getattr(config, "id2label", None) or {}
    return [names[number] for number in sorted(names)]
