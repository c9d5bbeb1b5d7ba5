"""Read limits and names of a loaded model from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def configurations(model: nn.Module) -> Iterator[Any]:
    """Give the configurations of transformers that parts of a model hold; some hold numbers under that name."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "get_text_config"):
            yield config


@contextmanager
def batched_experts(model: nn.Module) -> Iterator[None]:
    """Let a model on the meta device multiply all experts at once, in the one way whose shapes follow from the inputs'.

    Products of groups, which transformers takes by itself, have no float32 there.
    """
    before = [(config, getattr(config, "_experts_implementation", None)) for config in configurations(model)]
    for config, _ in before:
        config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation


def most_positions(module: nn.Module) -> int | None:
    """Give the most tokens that the model takes; None where its configuration sets no limit, or there is none.

    RoBERTa and its kin count positions from the one behind their padding index, so that their table of
    `max_position_embeddings` rows has fewer for tokens.
    """
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    limit: int | None = next(
        (size for part in (config, text) if (size := getattr(part, "max_position_embeddings", None) or -1) > 0), None
    )  # XLNet says -1 where there is none
    if limit is None:
        return None
    tables = (each for name, each in module.named_modules() if "position" in name and _rows(each) == limit)
    return min(
        (limit - padding - 1 for each in tables if (padding := getattr(each, "padding_idx", None)) is not None),
        default=limit,
    )


def _rows(module: nn.Module) -> int | None:
    """How many rows a table of embeddings has; some models' tables are no `nn.Embedding`."""
    shape = getattr(getattr(module, "weight", None), "shape", ())  # a weight on a kernel has a shape and no length
    rows: int | None = getattr(module, "num_embeddings", None)
    return rows or (shape[0] if shape else None)


def class_names(module: nn.Module | None) -> list[str]:
    """List the names of a classifier's classes in their order; none where it has no configuration."""
    config: Any = getattr(module, "config", None)
    names = getattr(config, "id2label", None) or {}
    return [names[number] for number in sorted(names)]
