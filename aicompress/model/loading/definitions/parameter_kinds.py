"""Kinds of layers and tied parameters of a checkpoint, from its architecture in transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from aicompress.errors import CheckpointError
from aicompress.layer import Kind
from aicompress.model import hf
from aicompress.model.kernels.is_linear import is_linear, multiplies
from aicompress.model.loading.definitions.definition import new_skeleton, skeleton

_EXPERTS = re.compile(r"experts$")


def layer_kinds(config: dict[str, Any], names: Iterable[str]) -> dict[str, Kind | None] | None:
    """Kinds of a checkpoint's parameters, from its architecture built without memory.

    Args:
        config: config.json.
        names: parameter names in the checkpoint; a base model's prefix may be missing or added.

    Returns:
        Kind by checkpoint name, None for what is no layer; names the architecture lacks are absent. None when
        transformers does not know the architecture: names and shapes must do.
    """
    model = skeleton(config)
    if model is None:
        return None
    known = _parameter_kinds(model)
    known |= _of_experts(config, model, known)
    prefix = f"{model.base_model_prefix}."
    kinds: dict[str, Kind | None] = {}
    others: list[str] = []
    for name in names:
        variant = next((v for v in (name, prefix + name, name.removeprefix(prefix)) if v in known), None)
        if variant is not None:
            kinds[name] = known[variant]
        else:
            others.append(name)
    return kinds | _renamed_kinds(model, known, others)


def _of_experts(config: dict[str, Any], model: Any, known: Mapping[str, Kind | None]) -> dict[str, Kind | None]:
    """Kinds of parameters whose first axis grows with the number of experts in config.json.

    A linear layer with an output for each expert is a router: no layer, for a rounded one chooses other experts. A
    tensor of three axes holds a matrix for each; one of two that belongs to no layer may hold them one below the other.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim in (2, 3)}
    stacked = {name for name, shape in shapes.items() if len(shape) == 3 or known.get(name) is None}
    kinds: dict[str, Kind | None] = {}
    for path, count in _expert_counts(model.config.to_dict()):
        candidates = {name for name, shape in shapes.items() if _may_hold(shape, count, name in stacked)} - kinds.keys()
        try:
            more = new_skeleton(_with(config, path, 2 * count)) if candidates else None
        except CheckpointError:  # bound to other numbers
            continue
        grown = {} if more is None else {name: tuple(p.shape) for name, p in more.named_parameters()}
        for name in candidates:
            if grown.get(name) == (2 * shapes[name][0], *shapes[name][1:]):
                kinds[name] = "experts" if name in stacked else None
    return kinds


def _may_hold(shape: tuple[int, ...], count: int, stacked: bool) -> bool:
    """Whether a shape can be that of a router, or of all experts, as matrices or one below the other."""
    if stacked and len(shape) == 2:
        return shape[0] > count and shape[0] % count == 0
    return shape[0] == count


def _expert_counts(section: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Fields of a configuration that can be a number of experts, with their values."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _expert_counts(value, (*path, key))
        elif _EXPERTS.search(str(key)) and type(value) is int and value > 1:
            yield (*path, key), value


def _with(config: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """config.json with one field changed; sections that it lacks are added."""
    key, *inner = path
    section = config.get(key)
    return {**config, key: _with(section if isinstance(section, dict) else {}, tuple(inner), value) if inner else value}


def _renamed_kinds(model: Any, known: Mapping[str, Kind | None], names: list[str]) -> dict[str, Kind | None]:
    """Kinds of parameters that transformers renames as it loads them, such as a Mixtral's routers."""
    placed = hf.parameter_names(model, names) if names else {}
    return {name: known[target] for name, (target, merge) in placed.items() if merge is None and target in known}


def tied_parameters(config: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Copy -> original of the checkpoint's parameters that the architecture ties; both must be there.

    Args:
        config: config.json.
        names: parameter names in the checkpoint; a base model's prefix may be missing or added.
    """
    groups = [[name for name in group.values() if name] for group in _tied_groups(config, names)]
    return {copy: original for original, *copies in filter(None, groups) for copy in dict.fromkeys(copies)}


def tied_elsewhere(config: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Parameter that the checkpoint does not store -> the one that the architecture ties it to; arguments as above."""
    groups = [(group, next(filter(None, group.values()), "")) for group in _tied_groups(config, names)]
    return {name: stored for group, stored in groups if stored for name, own in group.items() if not own}


def _tied_groups(config: dict[str, Any], names: Iterable[str]) -> list[dict[str, str]]:
    """For every tensor that several parameters share: these, as the architecture names them -> their names in the
    checkpoint, "" where it has none; the original first.
    """
    model = skeleton(config)
    if model is None:
        return []
    prefix = f"{model.base_model_prefix}."
    known = list(names)
    present = {variant: name for name in known for variant in (name.removeprefix(prefix), prefix + name, name)}
    groups: dict[str, dict[str, str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        group = groups.setdefault(source, {source: present.get(source, "")})
        group[target] = present.get(target, "")
    return list(groups.values())


def _parameter_kinds(model: Any) -> dict[str, Kind | None]:
    """Kind of every parameter of two or more dimensions; others are left to be copied."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    backbone = set(model.base_model.modules())
    counts = {count for _, count in _expert_counts(model.config.to_dict())}
    kinds: dict[str, Kind | None] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            kinds[full] = _module_kind(module, module is head or module not in backbone) if name == "weight" else None
            if kinds[full] == "linear" and parameter.shape[0] in counts and not is_linear(module):
                kinds[full] = None  # a router of a class of its own
    return kinds


def _module_kind(module: nn.Module, is_head: bool) -> Kind | None:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if multiplies(module):
        return "head" if is_head else "linear"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    return None
