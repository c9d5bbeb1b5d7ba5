"""What the configuration of a loaded model says of its inputs and outputs."""

from __future__ import annotations

from typing import Any

from torch import nn


def most_positions(module: nn.Module) -> int | None:
    """Tokens that the model takes at most; None where its configuration sets no limit, or there is none."""
    config: Any = getattr(module, "config", None)
    return getattr(config, "max_position_embeddings", None) or None


def class_names(module: nn.Module) -> list[str]:
    """Names of a classifier's classes in their order; none where it has no configuration."""
    config: Any = getattr(module, "config", None)
    names = getattr(config, "id2label", None) or {}
    return [names[number] for number in sorted(names)]
