"""A random model of an architecture with few of everything but heads, experts and blocks: small enough to be run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from aicompress.errors import CheckpointError
from aicompress.model.architecture import tiny_model as miniature
from aicompress.model.architecture.config_fields import WIDTH_FIELDS, Path, fields, value_at, with_value
from aicompress.model.architecture.shapes import build, is_taken

LARGEST = 50_000_000  # numbers in it
HEAD, NEURONS, VOCABULARY = 8, 8, 32
QUERY_FIELDS = (
    "num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
)  # fmt: skip
HIDDEN_FIELDS = ("hidden_size", "n_embd", "d_model", "dim")
SIZE_FIELDS = ("head_dim", "d_kv", "attention_head_dim", "kv_channels")


def reduced(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with few neurons, tokens, and entries of every head, wherever the architecture takes it."""
    wanted: list[tuple[Path, int]] = []
    for field in fields(config, ("vocab_size", "vocab_size_per_layer_input")):
        wanted.append((field, VOCABULARY))
    wanted += [(field, NEURONS) for field in fields(config, WIDTH_FIELDS)]
    wanted += [(field, HEAD) for field in fields(config, SIZE_FIELDS)]
    for query in fields(config, QUERY_FIELDS):
        section, heads = value_at(config, query[:-1]), value_at(config, query)
        if isinstance(heads, int) and heads > 0:
            wanted += [((*query[:-1], name), HEAD * heads) for name in HIDDEN_FIELDS if name in section]
    wanted = [(field, size) for field, size in wanted if _is_more(value_at(config, field), size)]
    special = ("pad_token_id", "bos_token_id", "eos_token_id")
    plain = {**config, **dict.fromkeys((name for name in special if name in config), 0)}
    together = plain
    for field, size in wanted:
        together = _resized(together, field, size)
    if is_taken(together):
        return together
    for field, size in wanted:  # some are bound to other numbers
        edited = _resized(plain, field, size)
        plain = edited if is_taken(edited) else plain
    return plain


def _is_more(present: Any, size: int) -> bool:
    return present is None or isinstance(present, list) or (isinstance(present, int) and present > size)


def _resized(config: Mapping[str, Any], field: Path, size: int) -> dict[str, Any]:
    present = value_at(config, field)
    return with_value(config, field, [size] * len(present) if isinstance(present, list) else size)


@torch.no_grad()
def started(config: Mapping[str, Any]) -> Any:
    """The model of a configuration with random weights, in float64.

    Raises:
        CheckpointError: it is too large for a trial, or its code does not run.
    """
    shapes = build(config)
    if sum(parameter.numel() for parameter in shapes.parameters()) > LARGEST:
        raise CheckpointError("its smallest model is too large for a trial", "")
    model = miniature.in_memory(shapes)
    miniature.randomize(model)
    return model
