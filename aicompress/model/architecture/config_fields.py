"""Numbers and lists of config.json by the names that architectures give them, at its top or in nested sections."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

# Of a field in config.json: ("text_config", "num_hidden_layers"); of one value of a list: ("intermediate_size", 3).
Path = tuple[str | int, ...]

DEPTH_FIELDS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth",
    "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip
WIDTH_FIELDS = (
    "intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "ffn_hidden_size", "feed_forward_size",
    "encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size",
    "intermediate_size_mlp", "shared_intermediate_size", "d_inner", "dff", "mlp_dim", "dim_feedforward",
)  # fmt: skip


def levels(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterable[tuple[str, ...]]:
    """Paths of config.json's sections: itself, and nested configurations of parts of the model."""
    yield path
    for key, value in config.items():
        if isinstance(value, dict) and key not in ("quantization_config", "rope_parameters", "rope_scaling"):
            yield from levels(value, (*path, key))


def fields(config: Mapping[str, Any], names: Iterable[str]) -> list[Path]:
    return [(*level, name) for level in levels(config) for name in names if name in value_at(config, level)]


def dotted(path: Path) -> str:
    """A field as messages name it."""
    return ".".join(map(str, path))


def value_at(config: Mapping[str, Any], path: Path) -> Any:
    """A field of config.json."""
    value: Any = config
    for key in path:
        value = value[key]
    return value


def with_value(config: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """config.json with one field changed."""
    edited = copy.deepcopy(dict(config))
    value_at(edited, path[:-1])[path[-1]] = value
    return edited
