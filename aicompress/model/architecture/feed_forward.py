"""Locate the feed-forward layers of an architecture: the axes of its tensors that hold neurons, by probing config.json.

`intermediate_size` doubled lengthens exactly the axes along which neurons lie. Where config.json lists a width for each
block, every one is given a size of its own. What shapes do not tell, the order of neurons in a fused tensor and which
tensors of merged experts read them, a small model is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product, takewhile
from typing import Any, Literal

from aicompress.checkpoint.naming import is_transposed
from aicompress.errors import CheckpointError
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.config_fields import WIDTH_FIELDS, Path, fields, value_at, with_value
from aicompress.model.architecture.experts import merged_experts
from aicompress.model.architecture.layer_groups import grouped
from aicompress.model.architecture.shapes import build, defaults, shapes_of
from aicompress.model.architecture.small_models.fused_neurons import NARROW, WIDE, lies_in_halves
from aicompress.model.architecture.small_models.neuron_order import lying
from aicompress.model.architecture.small_models.reduced_model import reduced

Settings = tuple[tuple[Path, Any], ...]


@dataclass(frozen=True)
class Coupling:
    """One tensor's share in the units of a layer, such as the neurons of a feed-forward layer.

    Attributes:
        tensor: the parameter.
        axis: its axis along which units lie.
        parts: how many times the units follow one another there: 2 for a fused gate and up projection.
        role: a producer computes the units, a consumer reads them.
        span: entries of a unit that lie beside one another: 2 where gate and up take turns.
    """

    tensor: str
    axis: int
    parts: int
    role: Literal["producer", "consumer"]
    span: int = 1


@dataclass(frozen=True)
class FeedForward:
    """The neurons of one feed-forward layer, of one expert, or of all experts that one tensor holds.

    Attributes:
        name: common prefix of its tensors, e.g. `model.layers.0`.
        width: number of neurons, of each expert.
        field: their number in config.json.
        couplings: every tensor that has an axis of neurons.
        experts: how many lie in each tensor: along its first axis, or one after the other on the axis of neurons.
        settings: what else config.json must say, so that the field is the very number of neurons.
    """

    name: str
    width: int
    field: Path
    couplings: tuple[Coupling, ...]
    experts: int = 1
    settings: Settings = ()


@dataclass(frozen=True)
class _Probe:
    """A width of config.json, and the size that it is given for a trial."""

    field: Path
    width: int | None
    size: int


def feed_forwards(architecture: Architecture) -> list[FeedForward]:
    """Every feed-forward layer whose width config.json sets."""
    layers = []
    for field in fields(architecture.config, WIDTH_FIELDS):
        for probes in _probes(field, value_at(architecture.config, field)):
            found = _of(architecture, probes) or _with_plain_width(architecture, probes)
            if found:
                layers += found
                break
    return layers


def sets_widths(architecture: Architecture) -> bool:
    """Whether any field of config.json changes shapes as a width does."""
    every = (
        _probes(field, value_at(architecture.config, field)) for field in fields(architecture.config, WIDTH_FIELDS)
    )
    found = (_shapes(architecture.config, probes) for tried in every for probes in tried)
    return any(shapes and shapes != architecture.shapes for shapes in found)


def _probes(field: Path, value: Any) -> list[list[_Probe]]:
    """Sizes to try one after the other: an odd one, which shows that nothing rounds it, else twice the width.

    A list of widths is tried with such that none is a multiple of another.
    """
    if value is None:
        return [[_Probe(field, None, 16)]]
    if isinstance(value, list) and value and all(_is_width(width) for width in value):
        least = 2 * max(value) + 4 * len(value)
        return [[_Probe((*field, block), width, least + block) for block, width in enumerate(value)]]
    return [[_Probe(field, value, size)] for size in (2 * value + 1, 2 * value)] if _is_width(value) else []


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _probed(config: Mapping[str, Any], probes: Sequence[_Probe]) -> dict[str, Any]:
    edited = dict(config)
    for probe in probes:
        edited = with_value(edited, probe.field, probe.size)
    return edited


def _shapes(config: Mapping[str, Any], probes: Sequence[_Probe]) -> Mapping[str, tuple[int, ...]]:
    """Shapes with other widths; none where transformers does not take these."""
    try:
        return shapes_of(_probed(config, probes))
    except CheckpointError:  # strict configurations do not take every number
        return {}


def _of(architecture: Architecture, probes: Sequence[_Probe]) -> list[FeedForward]:
    shapes = _shapes(architecture.config, probes)
    changed = [name for name, shape in architecture.shapes.items() if shapes.get(name, shape) != shape]
    if set(shapes) != set(architecture.shapes) or not changed:
        return []
    merged = merged_experts(architecture) if _may_be_merged(architecture, changed, probes) else {}
    places: list[tuple[Coupling, _Probe]] = []
    for name in changed:
        place = _place(architecture, (name, shapes[name]), probes, merged)
        if place is None:
            return []
        places.append(place)
    told = _told(architecture, [coupling for coupling, _ in places], merged, probes)
    if told is None:
        return []
    own = {coupling.tensor: probe for coupling, (_, probe) in zip(told, places, strict=True)}
    layers = [_layer(architecture, group, own, merged) for group in _groups(architecture, told, merged)]
    return [layer for layer in layers if layer is not None] if None not in layers else []


def _may_be_merged(architecture: Architecture, changed: Sequence[str], probes: Sequence[_Probe]) -> bool:
    """Whether some tensors hold neurons more than once; to find experts in them takes another model."""
    widths = {probe.width for probe in probes} - {None}
    shapes = [architecture.shapes[name] for name in changed]
    return any(len(shape) > 2 or (widths and not widths & set(shape)) for shape in shapes)


def _place(
    architecture: Architecture, probed: tuple[str, tuple[int, ...]], probes: Sequence[_Probe], merged: Mapping[str, int]
) -> tuple[Coupling, _Probe] | None:
    """Where neurons lie in a tensor that changed its shape, and what sets their number; None where it is not plain."""
    name, after = probed
    shape, disk = architecture.shapes[name], architecture.on_disk(name)
    axes = [axis for axis, size in enumerate(shape) if after[axis] != size]
    axis, experts = axes[0], merged.get(disk, 1)
    if len(axes) != 1 or (len(shape) > 2 and axis != 0 and experts == 1):
        return None  # kernels that the width goes through
    runs = experts if axis == 0 else 1
    for probe in probes:
        parts, rest = divmod(after[axis], probe.size * runs)
        if not rest and (probe.width is None or shape[axis] == parts * probe.width * runs):
            break
    else:
        return None
    produces = axis == (1 if is_transposed(disk, architecture.config) and len(shape) == 2 else 0)
    return Coupling(disk, axis, parts, "producer" if produces else "consumer"), probe


def _told(
    architecture: Architecture, couplings: list[Coupling], merged: Mapping[str, int], probes: Sequence[_Probe]
) -> list[Coupling] | None:
    """The couplings with what a small model tells of fused tensors and merged experts; None where it does not."""
    unsure = [each for each in couplings if each.parts > 1 or each.tensor in merged]
    if not unsure:
        return couplings
    sizes = [[replace(probe, size=size) for probe in probes] for size in (WIDE, NARROW)]
    plain = not any(each.tensor in merged for each in unsure)
    if plain and lies_in_halves(*(build(_probed(architecture.config, size)) for size in sizes)):
        return couplings
    axes = {each.tensor: (each.axis, merged.get(each.tensor, 1)) for each in couplings}
    for config in (reduced(architecture.config), architecture.config):  # the reduced one may be built and not run
        try:
            found = lying(_probed(config, sizes[0]), architecture.on_disk, axes, WIDE)
        except CheckpointError:
            continue
        told = [(each, found[each.tensor]) for each in couplings]
        return [replace(each, role=own.role, parts=each.parts // own.span, span=own.span) for each, own in told]
    return None


def _groups(architecture: Architecture, couplings: list[Coupling], merged: Mapping[str, int]) -> list[list[Coupling]]:
    """Couplings by layer; copies of shared parameters, which the checkpoint lacks, join theirs."""
    groups = [
        group
        for held in (True, False)
        for group in grouped([each for each in couplings if (each.tensor in merged) == held]).values()
        if group
    ]
    for copy, original in architecture.copies.items():
        mine, theirs = (
            next((group for group in groups if any(each.tensor == name for each in group)), None)
            for name in (copy, original)
        )
        if mine is None or theirs is None:
            continue
        mine[:] = [each for each in mine if each.tensor != copy]
        if mine is not theirs:
            theirs += mine
            groups.remove(mine)
    return groups


def _layer(
    architecture: Architecture, group: list[Coupling], own: Mapping[str, _Probe], merged: Mapping[str, int]
) -> FeedForward | None:
    """One layer; None where its tensors do not make and read the same neurons."""
    probes = {own[each.tensor] for each in group}
    experts = {merged.get(each.tensor, 1) for each in group}
    if {each.role for each in group} != {"producer", "consumer"} or len(probes) != 1 or len(experts) != 1:
        return None
    if experts != {1} and any(each.axis == 0 and each.parts > 1 for each in group):
        return None  # several runs for each expert on one axis
    (probe,), (count,) = probes, experts
    widths = set()
    for each in group:
        length = architecture.shapes_on_disk[each.tensor][each.axis]
        widths.add(length // (each.parts * each.span * (count if each.axis == 0 else 1)))
    if len(widths) != 1:
        return None
    return FeedForward(_name(group, count), widths.pop(), probe.field, tuple(group), count)


def _name(group: list[Coupling], experts: int) -> str:
    """What its tensors' names begin with: up to the number of the block, or of the expert; of merged experts, all."""
    if experts == 1:
        return next(iter(grouped(group)))
    pieces = zip(*(each.tensor.split(".") for each in group), strict=False)
    return ".".join(piece[0] for piece in takewhile(lambda piece: len(set(piece)) == 1, pieces))


def _with_plain_width(architecture: Architecture, probes: Sequence[_Probe]) -> list[FeedForward]:
    """Layers whose width the architecture works out from the field, with what makes it take the field as it is.

    That is a setting which is on, and which leaves every shape as it is when it is off and the field has the width of
    the tensors.
    """
    (probe, *others), level = probes, probes[0].field[:-1]
    if others or probe.width is None or not probe.size % 2:  # has been looked for with an odd size
        return []
    full, shapes = value_at(defaults(architecture.config), level), _shapes(architecture.config, probes)
    pairs = [pair for n, shape in architecture.shapes.items() for pair in zip(shape, shapes.get(n, shape), strict=True)]
    lengths = {size for size, other in pairs if size != other}
    for key, width in product([key for key, value in full.items() if value is True], lengths):
        setting = ((*level, key), False)
        plain = with_value(with_value(architecture.config, *setting), probe.field, width)
        try:
            same = shapes_of(plain) == architecture.shapes
        except CheckpointError:
            continue
        changed = replace(architecture, config=plain)
        layers = _of(changed, [_Probe(probe.field, width, 2 * width + 1)]) if same else []
        if layers:
            return [replace(layer, settings=(setting,)) for layer in layers]
    return []
