"""Locate the attention heads of an architecture: the axes of the tensors that hold them, by probing config.json.

As for feed-forward layers, the numbers of heads are changed, the model is built again on the meta device, and the axes
that changed length hold heads. With the query heads alone changed, the axes that only hold keys and values stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aicompress.checkpoint.naming import is_transposed
from aicompress.errors import CheckpointError
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.config_fields import Path, fields, value_at, with_value
from aicompress.model.architecture.layer_groups import by_reader
from aicompress.model.architecture.shapes import defaults, shapes_of
from aicompress.model.architecture.small_models.reduced_model import HIDDEN_FIELDS, QUERY_FIELDS, SIZE_FIELDS

KEY_FIELDS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")


@dataclass(frozen=True)
class HeadRun:
    """A run of heads on an axis.

    Attributes:
        kind: query heads, or key or value heads, of which there may be fewer.
        span: entries of a head.
    """

    kind: Literal["query", "key"]
    span: int


@dataclass(frozen=True)
class HeadTensor:
    """One tensor's share in the heads of an attention.

    Attributes:
        tensor: the parameter.
        axis: its axis along which heads lie.
        sections: what lies on it, in order.
        role: a producer makes queries, keys or values; a consumer reads what the heads give.
    """

    tensor: str
    axis: int
    sections: tuple[HeadRun, ...]
    role: Literal["producer", "consumer"]


@dataclass(frozen=True)
class HeadCount:
    """The numbers of config.json that set heads.

    Attributes:
        query, key, size: fields of the query heads, of the key-value heads where they are counted apart, and of a
            head's size; empty where that follows from the hidden width.
        heads, groups, width: their values; as many groups as heads where nothing counts them apart.
    """

    query: Path
    key: Path | None
    size: Path
    heads: int
    groups: int
    width: int

    def edited(self, config: Mapping[str, Any], heads: int, groups: int) -> dict[str, Any]:
        """config.json with other numbers of heads of the same size."""
        plain = with_value(with_value(config, self.query, heads), self.size, self.width)
        return plain if self.key is None else with_value(plain, self.key, groups)


@dataclass(frozen=True)
class Attention:
    """The heads of one attention.

    Attributes:
        name: common prefix of its tensors, e.g. `model.layers.0`.
        count: how many heads there are, and where config.json says so.
        tensors: every tensor that has an axis of heads.
        counts: where config.json cannot say fewer heads: attributes of modules that grow with their number, and what
            they are with all heads, by the module's name on disk.
    """

    name: str
    count: HeadCount
    tensors: tuple[HeadTensor, ...]
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def field(self) -> Path:
        """The number of query heads in config.json."""
        return self.count.query


def attentions(architecture: Architecture) -> list[Attention]:
    """Every attention whose number of heads config.json sets apart from the heads' size.

    Raises:
        CheckpointError: heads are there but lie in a way that cannot be told, or are tied together across layers.
    """
    full = defaults(architecture.config)
    layers: list[Attention] = []
    for query in fields(full, QUERY_FIELDS):
        count = _count(full, query)
        if count is not None:
            layers += _of(architecture, count)
    return layers


def head_counts(config: Mapping[str, Any]) -> list[HeadCount]:
    """Numbers of heads that a config.json sets, wherever they lie and whether or not they can change."""
    full = defaults(config)
    return [count for query in fields(full, QUERY_FIELDS) if (count := _count(full, query)) is not None]


def _count(full: Mapping[str, Any], query: Path) -> HeadCount | None:
    section = value_at(full, query[:-1])
    heads = section[query[-1]]
    key = next((name for name in KEY_FIELDS if isinstance(section.get(name), int)), None)
    hidden = next((section[name] for name in HIDDEN_FIELDS if isinstance(section.get(name), int)), None)
    if not isinstance(heads, int) or heads < 1:
        return None
    # Where config.json has no size of heads, some architectures still read head_dim: the probe tells.
    size = next((name for name in SIZE_FIELDS if isinstance(section.get(name), int)), "head_dim")
    width = section.get(size) or (hidden // heads if hidden and hidden % heads == 0 else None)
    if width is None:
        return None
    groups = section[key] if key else heads
    if heads % groups:
        return None
    level = query[:-1]
    return HeadCount(query, (*level, key) if key else None, (*level, size), heads, groups, width)


def _of(architecture: Architecture, count: HeadCount) -> list[Attention]:
    probes = None
    for factor in (2, 0.5, 3, 4):  # strict configurations do not take every number
        heads, groups = count.heads * factor, count.groups * factor
        if heads % 1 or groups % 1 or heads % groups:
            continue
        try:
            both = shapes_of(count.edited(architecture.config, int(heads), int(groups)))
            alone = both
            if count.key is not None:
                alone = shapes_of(count.edited(architecture.config, int(heads), count.groups))
        except CheckpointError:
            continue
        probes = both, alone, factor
        break
    if probes is None or set(probes[0]) != set(architecture.shapes):
        return []
    changed = [(name, shape) for name, shape in architecture.shapes.items() if probes[0][name] != shape]
    whole = all(_grown(shape, probes[0][name]) == {probes[2]} for name, shape in changed)
    if not whole:
        return []  # their size follows from their number
    tensors = [
        tensor
        for name, shape in changed
        if architecture.on_disk(name) not in architecture.copies
        for tensor in _tensors(architecture, count, (name, shape), (probes[0][name], probes[1][name], probes[2]))
    ]
    return [Attention(name, count, tuple(group)) for name, group in by_reader(tensors)]


def _grown(shape: tuple[int, ...], after: tuple[int, ...]) -> set[float]:
    """By what factors the axes of a tensor grew."""
    return {other / size for size, other in zip(shape, after, strict=True) if size != other}


def _tensors(
    architecture: Architecture,
    count: HeadCount,
    tensor: tuple[str, tuple[int, ...]],
    probed: tuple[tuple[int, ...], tuple[int, ...], float],
) -> Iterable[HeadTensor]:
    name, shape = tensor
    both, alone, factor = probed
    disk = architecture.on_disk(name)
    axes = [axis for axis, size in enumerate(shape) if both[axis] != size]
    if len(axes) != 1 or both[axes[0]] != shape[axes[0]] * factor:
        raise CheckpointError(
            f"{disk} does not change with the number of heads as heads do", "heads cannot be pruned in it"
        )
    axis, length = axes[0], shape[axes[0]]
    queries = round((alone[axis] - length) / (factor - 1)) if count.key is not None else length
    sections = _sections(count, queries, length - queries)
    if sections is None:
        raise CheckpointError(
            f"{disk}: how heads lie on its axis of {length} cannot be told, where config.json counts {count.heads} "
            f"heads and {count.groups} keys of {count.width}",
            "its heads cannot be pruned: prune feed-forward neurons (width) or whole blocks (depth)",
        )
    matrix = architecture.specs.get(f"{disk.rpartition('.')[0]}.weight")
    if len(shape) == 1 and sections[0].span > 1 and (matrix is None or len(matrix.shape) < 2):
        raise CheckpointError(f"{disk} works over all heads together", "without some, the others would change")
    table = len(shape) == 2 and all(section.span == 1 for section in sections)  # a number of every head, such as a bias
    produces = table or axis == (1 if is_transposed(disk, architecture.config) and len(shape) == 2 else 0)
    yield HeadTensor(disk, axis, sections, "producer" if produces else "consumer")


def _sections(count: HeadCount, queries: int, keys: int) -> tuple[HeadRun, ...] | None:
    """Sections of an axis with so many entries of query heads and of key and value heads."""
    if not keys and queries % count.heads == 0:
        span = queries // count.heads
        if span == 3 * count.width:
            return (HeadRun("query", count.width),) * 3
        return (HeadRun("query", span),)  # of another size where one tensor makes keys and values, say: it is tried
    if not queries and keys % count.groups == 0 and keys // count.groups in (1, count.width):
        return (HeadRun("key", keys // count.groups),)
    if queries == count.heads * count.width and keys == 2 * count.groups * count.width:
        return (HeadRun("query", count.width), HeadRun("key", count.width), HeadRun("key", count.width))
    return None
