"""A random model of an architecture with few of everything but heads, experts and blocks: small enough to be run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from aicompress.errors import CheckpointError
from aicompress.model.architecture.config_fields import WIDTH_FIELDS, Path, fields, value_at, with_value
from aicompress.model.architecture.shapes import build, is_taken
from aicompress.model.architecture.small_models import tiny_model

LARGEST = 50_000_000  # numbers in it
HEAD, NEURONS, VOCABULARY = 8, 8, 32
UNITS = 1024  # tokens and neurons of a model that is to show other sizes
VOCABULARY_FIELDS = ("vocab_size", "vocab_size_per_layer_input")
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
QUERY_FIELDS = (
    "num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
    "attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
)  # fmt: skip
HIDDEN_FIELDS = ("hidden_size", "n_embd", "d_model", "dim")
# What a short input is padded to, or cut into; and how much of a head is rotated, which may not be more than a head.
WINDOW_FIELDS = {
    "attention_window": 8, "block_size": 8, "chunk_size": 8, "mamba_chunk_size": 8, "num_global_tokens": 4,
    "rotary_dim": 4,
}  # fmt: skip
SIZE_FIELDS = ("head_dim", "d_kv", "attention_head_dim", "kv_channels")


def reduced(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with few neurons, tokens, and entries of every head, wherever the architecture takes it."""
    wanted: list[tuple[Path, int]] = [(field, HEAD) for field in fields(config, SIZE_FIELDS)]
    for query in fields(config, QUERY_FIELDS):
        section, heads = value_at(config, query[:-1]), value_at(config, query)
        if isinstance(heads, int) and heads > 0:
            wanted += [((*query[:-1], name), HEAD * heads) for name in HIDDEN_FIELDS if name in section]
    return with_few(config, wanted)


def with_few(config: Mapping[str, Any], further: Iterable[tuple[Path, int]] = ()) -> dict[str, Any]:
    """config.json with few neurons and tokens, and as few of `further`, wherever the architecture takes it."""
    wanted = [(field, VOCABULARY) for field in fields(config, VOCABULARY_FIELDS)]
    wanted += [(field, NEURONS) for field in fields(config, WIDTH_FIELDS)]
    wanted = [(field, size) for field, size in (*wanted, *further) if _is_more(_present(config, field), size)]
    return _with(with_short_windows(_with_first_tokens(config)), wanted)


def with_fewer_units(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose memory follows no vocabulary or width of feed-forward layers that is large."""
    wanted = [(field, UNITS, value_at(config, field)) for field in fields(config, (*VOCABULARY_FIELDS, *WIDTH_FIELDS))]
    larger = [(field, size) for field, size, present in wanted if isinstance(present, int) and present > size]
    return _with(_with_first_tokens(config), larger) if larger else dict(config)


def _with_first_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json that gives a special part to no token that may be missing."""
    return {**config, **dict.fromkeys((name for name in SPECIAL if name in config), 0)}


def with_short_windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model that runs fast on a few tokens, wherever the architecture takes it."""
    wanted = [(field, WINDOW_FIELDS[str(field[-1])]) for field in fields(config, WINDOW_FIELDS)]
    held = [(field, size, value_at(config, field)) for field, size in wanted]
    return _with(dict(config), [(field, size) for field, size, present in held if present and _is_more(present, size)])


def _with(plain: dict[str, Any], wanted: Iterable[tuple[Path, int]]) -> dict[str, Any]:
    """config.json with other numbers: all of them, or, where they are refused together, each that is taken."""
    together = plain
    for field, size in wanted:
        together = _resized(together, field, size)
    if together is plain or is_taken(together):
        return together
    for field, size in wanted:  # some are bound to other numbers
        edited = _resized(plain, field, size)
        plain = edited if is_taken(edited) else plain
    return plain


def _is_more(present: Any, size: int) -> bool:
    return present is None or isinstance(present, list) or (isinstance(present, int) and present > size)


def _present(config: Mapping[str, Any], field: Path) -> Any:
    return value_at(config, field[:-1]).get(field[-1])


def _resized(config: Mapping[str, Any], field: Path, size: int) -> dict[str, Any]:
    present = _present(config, field)
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
    model = tiny_model.in_memory(shapes)
    tiny_model.randomize(model)
    return model
