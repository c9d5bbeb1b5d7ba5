"""Locate the hidden width of a transformer: the axes that its residual stream lies on, by probing config.json.

config.json's `hidden_size` is changed and the model built again on the meta device. Where heads have a size of their
own, exactly the axes of the residual stream change: of embeddings, norms, heads, and the one side of each matrix that
reads it or adds to it. Where heads are a share of the hidden width, other axes change as well, and the shapes do not
tell which is which: a tiny model does (see `small_models.tiny_model`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from aicompress.checkpoint.naming import is_transposed
from aicompress.errors import CheckpointError
from aicompress.model.architecture.architecture import Architecture, keep_blocks
from aicompress.model.architecture.config_fields import (
    DEPTH_FIELDS,
    WIDTH_FIELDS,
    Path,
    dotted,
    fields,
    value_at,
    with_value,
)
from aicompress.model.architecture.feed_forward import Coupling, feed_forwards
from aicompress.model.architecture.shapes import build, is_taken, reads_size, shapes_of
from aicompress.model.architecture.small_models import tiny_model
from aicompress.model.architecture.small_models.reduced_model import with_fewer_units, with_short_windows
from aicompress.model.loading.definitions.parameter_kinds import layer_kinds

FIELDS = ("hidden_size", "d_model", "n_embd", "dim")
HEAD_COUNTS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
    "attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
)  # fmt: skip
COMPANIONS = ("word_embed_proj_dim", "embedding_size")  # widths of tables, which projections adapt where they differ
HINT = "prune its heads, feed-forward neurons or layers instead"


@dataclass(frozen=True, eq=False)
class Residual:
    """The coordinates of the residual stream.

    Attributes:
        width: how many there are.
        field: their number in config.json.
        config: config.json with the size of a head given, where it would follow from the hidden width otherwise.
        couplings: every tensor that has an axis of coordinates: one that adds to the stream is a producer, one that
            reads it a consumer; norms count as producers.
        inner: every tensor that has an axis along which heads lie whose size is a share of the width, its parts counted
            in heads unless entries may change places; none where heads have a size of their own.
        heads, groups: how many heads share it, and how many keys these read.
    """

    width: int
    field: Path
    config: Mapping[str, Any]
    couplings: tuple[Coupling, ...]
    inner: tuple[Coupling, ...] = ()
    heads: int = 1
    groups: int = 1

    def narrowed(self, width: int) -> dict[str, Any]:
        """config.json of a model of another hidden width."""
        return with_width(self.config, self.field, width)

    def refusal(self, width: int) -> str | None:
        """Why transformers does not take a width; None where it does."""
        try:
            build(self.narrowed(width))
        except CheckpointError as error:
            return error.message
        return None


def with_width(config: Mapping[str, Any], field: Path, width: int) -> dict[str, Any]:
    """config.json with another hidden width; a table of that width follows it."""
    edited, before = with_value(config, field, width), value_at(config, field)
    section = value_at(edited, field[:-1])
    section.update({name: width for name in COMPANIONS if name in section and section[name] == before})
    return edited


def residual(architecture: Architecture, layout: tiny_model.Layout = "entries", level: Path | None = None) -> Residual:
    """The residual stream of a checkpoint.

    Args:
        architecture: its architecture.
        layout: how heads lie on the axes inside attention, as a trial has to confirm.
        level: section of config.json whose width is meant; None where there is one.

    Raises:
        CheckpointError: no field of config.json sets its width, or its axes cannot be told.
    """
    outcome = _located(architecture, layout, level)
    if isinstance(outcome, str):
        raise CheckpointError(outcome, HINT)
    return outcome


@lru_cache(maxsize=32)
def _located(architecture: Architecture, layout: tiny_model.Layout, level: Path | None) -> Residual | str:
    """The residual stream, or why there is none; a step asks for it several times."""
    reasons: list[str] = []
    without: list[Residual] = []  # what shares the width has a size of its own there
    for field in fields(architecture.config, FIELDS):
        width = value_at(architecture.config, field)
        if not isinstance(width, int) or width < 2 or level not in (None, field[:-1]):
            continue
        for config in _with_sizes(architecture, field, width):
            outcome = _probed(architecture, config, (field, width), layout)
            if isinstance(outcome, str):
                reasons.append(outcome)
            elif outcome.inner or layout in tiny_model.OF_ENTRIES:
                return outcome
            else:
                without.append(outcome)
    if without:
        return without[0]
    return f"the hidden width cannot be narrowed: {reasons[-1]}" if reasons else "config.json sets no hidden width"


def _with_sizes(architecture: Architecture, field: Path, width: int) -> Iterator[dict[str, Any]]:
    """config.json with the size of a head and of feed-forward layers written down, where the width would set them."""
    edited = copy.deepcopy(dict(architecture.config))
    section = value_at(edited, field[:-1])
    for name in WIDTH_FIELDS:
        if section.get(name, 0) is None:
            sizes = {each.width for each in feed_forwards(architecture) if each.field == (*field[:-1], name)}
            section[name] = sizes.pop() if len(sizes) == 1 else None
    heads = next((section[name] for name in HEAD_COUNTS if isinstance(section.get(name), int)), 0)
    if not section.get("head_dim") and not section.get("d_kv") and heads and width % heads == 0:
        written = copy.deepcopy(edited)
        value_at(written, field[:-1])["head_dim"] = width // heads
        if reads_size(written, (*field[:-1], "head_dim"), architecture.shapes):
            yield written
    yield edited  # also where a norm of a head is as long as its share, whatever the size that is written down


def _probed(
    architecture: Architecture, config: Mapping[str, Any], where: tuple[Path, int], layout: tiny_model.Layout
) -> Residual | str:
    """The residual stream as another width shows it, or why it cannot be told."""
    field, width = where
    model = build(config)
    before, after = shapes_of(config), shapes_of(with_width(config, field, 2 * width))
    if before != architecture.shapes:
        return "the sizes that follow from it cannot be written down in config.json"
    if set(after) != set(before):
        return f"{dotted(field)} of config.json adds or removes tensors"
    heads = next(iter(integers(value_at(config, field[:-1]), HEAD_COUNTS)), 1)
    unit = width if layout in tiny_model.OF_ENTRIES or width % heads else width // heads
    axes = {name: changed_axes(shape, after[name], unit) for name, shape in before.items()}
    strange = next((name for name, lengths in axes.items() if lengths is None), None)
    if strange is not None:
        return f"{architecture.on_disk(strange)} of shape {before[strange]} does not change as the stream does"
    lengths = {times for found in axes.values() for times in (found or {}).values()} if unit < width else set()
    models, reason = tiny_models(config, field, heads), ""
    for groups in _groups(lengths, heads):
        shared = tiny_model.Sharing(heads, groups, layout)
        parts = tiny_model.parts_of(models, shared)
        if not isinstance(parts, str):
            return _coupled(architecture, model, (config, field, width, shared), parts)
        reason = parts
    return reason


def _groups(lengths: Iterable[int], heads: int) -> list[int]:
    """How many keys the heads may read, by the lengths of axes in heads; 1 is that of a vector for all heads.

    An axis holds queries, keys, or queries with keys and values; where each holds whole widths, most likely as many
    keys as queries.
    """
    fewer = [(length - heads) // 2 if length > heads else length for length in sorted(lengths) if length > 1]
    fewer = [groups for groups in fewer if groups > 0 and heads % groups == 0 and groups < heads]
    plain = all(length % heads == 0 or length == 1 for length in lengths)
    return list(dict.fromkeys([heads, *fewer] if plain else [*fewer, heads]))


def changed_axes(shape: tuple[int, ...], after: tuple[int, ...], unit: int) -> dict[int, int] | None:
    """Axes that follow the width, with how many times a unit lies on each; None where one follows it otherwise."""
    changed = {axis: size // unit for axis, size in enumerate(shape) if after[axis] != size}
    fits = all(shape[axis] == times * unit and after[axis] == 2 * shape[axis] for axis, times in changed.items())
    return changed if fits and all(changed.values()) else None


def tiny_models(config: Mapping[str, Any], field: Path, heads: int) -> tuple[Any, Any]:
    """The same architecture of two blocks with few coordinates for each head, on the meta device."""
    narrow, wide = (small(config, field, size * heads) for size in (tiny_model.NARROW, tiny_model.WIDE))
    return build(narrow), build(wide)


def small(config: Mapping[str, Any], field: Path, width: int) -> dict[str, Any]:
    """config.json with two blocks at most, few tokens and neurons, short windows, and another hidden width."""
    edited = with_fewer_units(with_short_windows(config))
    for depth in fields(config, DEPTH_FIELDS):
        size = value_at(config, depth)
        if isinstance(size, int) and size > 2:
            fewer = keep_blocks(edited, depth, range(2))
            edited = fewer if is_taken(fewer) else edited
    return with_width(edited, field, width)


def _coupled(
    architecture: Architecture,
    model: Any,
    where: tuple[Mapping[str, Any], Path, int, tiny_model.Sharing],
    parts: tiny_model.Parts,
) -> Residual | str:
    """The stream's tensors under their names on disk, from what the tiny model shows of each kind of tensor."""
    config, field, width, shared = where
    unit = width if shared.layout in tiny_model.OF_ENTRIES else width // shared.heads
    names = [architecture.on_disk(name) for name in architecture.shapes]
    kinds = layer_kinds(dict(architecture.config), names) or {}
    tied = {architecture.on_disk(name) for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    after = shapes_of(with_width(config, field, 2 * width))
    stream: list[Coupling] = []
    inner: list[Coupling] = []
    for name, shape in architecture.shapes.items():
        disk = architecture.on_disk(name)
        if disk in tied and disk not in architecture.specs:
            continue  # stored once, under its other name
        transposed = is_transposed(disk, dict(architecture.config)) and len(shape) == 2
        for axis, times in (changed_axes(shape, after[name], unit) or {}).items():
            reading = len(shape) == 2 and kinds.get(disk) != "embedding" and axis == (0 if transposed else 1)
            role: Any = "consumer" if reading and disk not in tied else "producer"
            if parts.get((tiny_model.family(name), axis)) == "inner":
                inner.append(Coupling(disk, axis, times, role))
            elif shape[axis] % width == 0:  # else a vector of one head's length
                stream.append(Coupling(disk, axis, shape[axis] // width, role))
    if {coupling.role for coupling in stream} != {"producer", "consumer"}:
        return f"{dotted(field)} of config.json governs no stream that is written and read"
    return Residual(width, field, config, tuple(stream), tuple(inner), shared.heads, shared.groups)


def integers(config: Mapping[str, Any], names: Iterable[str]) -> list[int]:
    """Whole numbers under these names, at the top of config.json or one level below."""
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    return [section[name] for section in sections for name in names if isinstance(section.get(name), int)]
