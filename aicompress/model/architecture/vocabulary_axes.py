"""Locate the axes along which a model's tokens lie, by probing config.json.

A number of tokens in config.json is changed and the model built again on the meta device: the axes that grow with it
are those of embeddings, heads and their biases.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aicompress.errors import CheckpointError
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.config_fields import Path, dotted, fields, levels, value_at, with_value
from aicompress.model.architecture.shapes import changed, defaults, shapes_of

FURTHER = "vocab_size_per_layer_input"  # of a table for every layer, which may hold the first tokens only
FIELDS = ("vocab_size", "decoder_vocab_size", "text_vocab_size", FURTHER)
MORE = 64  # tokens that a probe adds
# What counts tokens in a way that is not followed when some of them go.
COUNTING = ("vocab_offset", "vocabulary_map")
HINT = "its vocabulary cannot be pruned"


@dataclass(frozen=True)
class TokenTable:
    """Axes with an entry for each token of one vocabulary.

    Attributes:
        size: how many tokens.
        fields: their number in config.json, wherever it stands.
        axes: tensors of the checkpoint with the axis.
    """

    size: int
    fields: tuple[Path, ...]
    axes: tuple[tuple[str, int], ...]


def token_tables(architecture: Architecture) -> tuple[dict[str, Any], tuple[TokenTable, ...]]:
    """The axes of a model's tokens: those of the vocabulary that it is given, then a table of the first of them.

    Returns:
        config.json with the numbers of tokens that transformers would fill in, and the tables.

    Raises:
        CheckpointError: no field sets its number of tokens, or the axes cannot be told.
    """
    config = _explicit(architecture.config)
    counted = [name for name in COUNTING if fields(config, [name])]
    if counted:
        raise CheckpointError(f"{counted[0]} of config.json counts tokens in a way that is not known", HINT)
    grown = {field: _grown(architecture, config, field) for field in fields(config, FIELDS) if _is_size(config, field)}
    counting = [field for field, axes in grown.items() if axes and field[-1] != FURTHER]
    if not counting:
        raise CheckpointError("no field of config.json sets the number of tokens of a table", HINT)
    size = value_at(config, counting[0])
    other = next((field for field in counting if value_at(config, field) != size), None)
    if other is not None:
        told = f"{dotted(counting[0])} and {dotted(other)} of config.json count tokens of two vocabularies"
        raise CheckpointError(told, HINT)
    alike = tuple(field for field in grown if field[-1] != FURTHER and value_at(config, field) == size)
    axes = dict.fromkeys(axis for field in alike for axis in grown[field])
    axes |= dict.fromkeys(_unknown(architecture, size))
    tables = [TokenTable(size, alike, tuple(axes))]
    for field in grown:
        if field[-1] == FURTHER and grown[field] and value_at(config, field) <= size:
            tables.append(TokenTable(value_at(config, field), (field,), tuple(grown[field])))
    return config, tuple(tables)


def _explicit(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the numbers of tokens that transformers would fill in."""
    full, explicit = defaults(config), copy.deepcopy(dict(config))
    for level in levels(explicit):
        section = value_at(explicit, level)
        try:
            derived = value_at(full, level)
        except (KeyError, TypeError):
            continue
        section.update({name: derived[name] for name in FIELDS if name in derived and section.get(name) is None})
    return explicit


def _is_size(config: Mapping[str, Any], field: Path) -> bool:
    size = value_at(config, field)
    return type(size) is int and size > 1


def _grown(architecture: Architecture, config: Mapping[str, Any], field: Path) -> list[tuple[str, int]]:
    """Axes of the checkpoint's tensors that grow with a number of tokens.

    Raises:
        CheckpointError: one grows otherwise.
    """
    size = value_at(config, field)
    more = with_value(config, field, size + MORE)
    changed(more, f"transformers makes no model of {size + MORE} tokens in {dotted(field)}", HINT)
    before, after = architecture.shapes, shapes_of(more)
    axes: list[tuple[str, int]] = []
    for name, shape in before.items():
        wider = after.get(name, ())
        disk = architecture.on_disk(name)
        for axis, length in enumerate(shape if len(wider) == len(shape) else ()):
            if wider[axis] == length:
                continue
            if wider[axis] != length + MORE or length < size:
                raise CheckpointError(f"{disk} of shape {shape} does not grow with its tokens", HINT)
            if disk in architecture.specs:
                axes.append((disk, axis))
    if before.keys() != after.keys():
        raise CheckpointError(f"{dotted(field)} of config.json adds or removes tensors", HINT)
    return axes


def _unknown(architecture: Architecture, size: int) -> list[tuple[str, int]]:
    """Tensors with an entry for each token that the architecture does not have, such as a head beside an encoder."""
    unknown = {name: spec.shape for name, spec in architecture.specs.items() if name not in architecture.names}
    return [(name, 0) for name, shape in unknown.items() if shape and shape[0] == size]
