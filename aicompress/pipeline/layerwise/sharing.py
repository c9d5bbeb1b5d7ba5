"""Layers that store a part of their weights once: groups that a method makes, and those that an input has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.naming import layer_name
from aicompress.errors import listed
from aicompress.layer import LayerInfo
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.pipeline.layerwise.resolve import candidates_of
from aicompress.pipeline.step.layer_plan import Group, LayerPlan, sharing_budgets
from aicompress.pipeline.step.output import Planned
from aicompress.weights import Dense


def grouped(
    checkpoint: Checkpoint, layers: Mapping[str, LayerPlan], method: AnyLayerMethod, seed: int
) -> tuple[dict[str, LayerPlan], list[str]]:
    """The layers with the groups that a method makes of them, and notes that tell which share nothing.

    Of one that shares nothing the parameters are left out where the method does nothing with it.
    """
    shares = method.shares
    if shares is None:
        return dict(layers), []
    found: dict[str, LayerPlan] = {}
    for members in sharing_budgets(layers.values()).values():
        for numbers in shares.groups(candidates_of(checkpoint, members, method, seed)):
            group = Group(tuple(members[number].info.tensor for number in numbers), shares.part)
            found |= {members[number].info.name: replace(members[number], group=group) for number in numbers}
    alone = [name for name in layers if name not in found]
    notes = [*_told(list(found.values())), *_left(method, layers, alone)]
    if not shares.alone:
        return {name: found[name] for name in layers if name in found}, notes
    return {name: found.get(name, layer) for name, layer in layers.items()}, notes


def _told(layers: Sequence[LayerPlan]) -> list[str]:
    """A note on groups of layers, the first one for an example."""
    groups = dict.fromkeys(layer.group.members for layer in layers if layer.group is not None)
    if not groups:
        return []
    first, *others = map(layer_name, next(iter(groups)))
    shown = listed(others)
    return [f"{len(layers)} layers in {len(groups)} groups store once what they share: {first} with {shown}, for one"]


def _left(method: AnyLayerMethod, layers: Mapping[str, LayerPlan], alone: Sequence[str]) -> list[str]:
    """A note on layers that share nothing."""
    assert method.shares is not None
    if not alone:
        return []
    shown = listed(alone)
    many = f"{len(alone)} of {len(layers)} layers" if len(alone) < len(layers) else "no layer"
    verb = "shares a tensor" if many == "no layer" else "share no tensor"
    done = "each is compressed by itself" if method.shares.alone else "left as they are"
    return [f"{many} {verb} with another, {method.shares.why}: {done}" + ("" if many == "no layer" else f": {shown}")]


def outlined(method: AnyLayerMethod, layers: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """The layers with the outlines of their groups in the place of their own."""
    if method.shares is None:
        return dict(layers)
    by_tensor = {layer.info.tensor: layer for layer in layers.values()}
    changed = dict(layers)
    for group in {layer.group for layer in layers.values() if layer.group is not None}:
        members = [by_tensor[name] for name in group.members]
        outlines = method.shares.outline([member.info for member in members], members[0].config)
        for member, outline in zip(members, outlines, strict=True):
            changed[member.info.name] = replace(member, outline=outline)
    return changed


def with_groups(planned: Mapping[str, Planned], layers: Sequence[LayerPlan]) -> dict[str, Planned]:
    """The parameters of an output with the owners of what they share by their groups."""
    shared = {
        layer.info.tensor: layer.group.owners(layer.info.tensor)
        for layer in layers
        if layer.group is not None and layer.outline is not None and not isinstance(layer.outline, Dense)
    }
    return {name: replace(each, owners=shared.get(name, each.owners)) for name, each in planned.items()}


def following(checkpoint: Checkpoint, planned: Mapping[str, Planned]) -> dict[str, Planned]:
    """The parameters of an output, of which those that share parts of others take what these have become."""

    def follow(name: str) -> Planned:
        own = planned[name]
        for part, owner in checkpoint.manifest.owners(name).items():
            its = follow(owner)
            assert own.weight is not None
            weight = its.weight or Dense.outline(own.weight.shape, its.dense.dtype)
            own = replace(own, weight=own.weight.borrowing(part, weight), owners={**own.owners, part: owner})
        return own

    return {name: follow(name) for name in planned}


def followers(infos: Sequence[LayerInfo]) -> list[str]:
    """A note that tells which layers are another parameter's, and change with it."""
    names = [info for info in infos if info.owner]
    if not names:
        return []
    shown = listed(f"{info.name} ({layer_name(info.owner)})" for info in names)
    return [f"{len(names)} layers are stored once with another one and change with it: {shown}"]
