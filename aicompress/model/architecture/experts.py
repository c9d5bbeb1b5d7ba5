"""Locate the experts and routers of an architecture: the tensors that shrink when config.json counts one expert less.

Experts that are stored one by one lose the tensors of the last one; those that are stored in one tensor, and the router
that chooses among them, lose an entry of an axis.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from aicompress.errors import CheckpointError
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.config_fields import Path, fields, levels, value_at, with_value
from aicompress.model.architecture.shapes import defaults, shapes_of

COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
GROUP_FIELDS = ("n_group", "num_expert_group")


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer.

    Attributes:
        name: common prefix of its tensors, e.g. `model.layers.0`.
        size: number of experts.
        chosen: how many of them a token goes to.
        groups: runs of experts of which a router chooses first; 1 where there are none.
        field: the number of experts in config.json.
        singles: tensors of single experts, by expert: the prefix up to the expert's number, and what follows it.
        axes: axes of experts in tensors that hold all of them, the router's among these.
    """

    name: str
    size: int
    chosen: int
    groups: int
    field: Path
    singles: tuple[tuple[str, str], ...]
    axes: tuple[tuple[str, int], ...]

    def single(self, place: tuple[str, str], expert: int) -> str:
        """Name of one expert's tensor."""
        return f"{place[0]}.{expert}.{place[1]}"


def mixtures(architecture: Architecture) -> list[Mixture]:
    """Every layer of experts whose number config.json sets."""
    full = defaults(architecture.config)
    return [mixture for field in fields(full, COUNT_FIELDS) for mixture in _of(architecture, full, field)]


def _of(architecture: Architecture, full: dict[str, Any], field: Path) -> list[Mixture]:
    size, section = value_at(full, field), value_at(full, field[:-1])
    if not isinstance(size, int) or size < 2:
        return []
    chosen = next((section[name] for name in CHOSEN_FIELDS if isinstance(section.get(name), int)), 1)
    groups = next((section[name] for name in GROUP_FIELDS if isinstance(section.get(name), int)), 1) or 1
    try:
        fewer = shapes_of(with_value(architecture.config, field, size - 1))
    except CheckpointError:
        return []
    singles: dict[str, list[tuple[str, str]]] = defaultdict(list)
    axes: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, shape in architecture.shapes.items():
        disk, after = architecture.on_disk(name), fewer.get(name)
        if after is None:
            match = re.fullmatch(rf"(.+)\.{size - 1}\.(.+?)", disk)
            if match is None:
                return []
            singles[_layer(disk)].append((match[1], match[2]))
        elif after != shape:
            changed = [axis for axis, (a, b) in enumerate(zip(shape, after, strict=True)) if a != b]
            if len(changed) != 1 or shape[changed[0]] != size:
                return []
            axes[_layer(disk)].append((disk, changed[0]))
    return [
        Mixture(layer, size, chosen, groups, field, tuple(singles.get(layer, ())), tuple(axes.get(layer, ())))
        for layer in dict.fromkeys([*axes, *singles])
    ]


def merged_experts(architecture: Architecture) -> dict[str, int]:
    """Tensors that hold all experts of a layer, along the first axis or one after the other on it, and their number."""
    full, merged = defaults(architecture.config), dict[str, int]()
    for field in fields(full, COUNT_FIELDS):
        size = value_at(full, field)
        if not isinstance(size, int) or size < 2 or field[:-1] not in set(levels(architecture.config)):
            continue
        try:
            double = shapes_of(with_value(architecture.config, field, 2 * size))
        except CheckpointError:
            continue
        for name, shape in architecture.shapes.items():
            after = double.get(name, shape)
            if len(shape) > 1 and after == (2 * shape[0], *shape[1:]):
                merged[architecture.on_disk(name)] = size
    return merged


def _layer(name: str) -> str:
    """The block that a tensor belongs to."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else ""
