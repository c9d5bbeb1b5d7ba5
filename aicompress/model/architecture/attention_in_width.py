"""Locate heads where the head size is the hidden width over their number: BERT, GPT-2, GPT-NeoX and their kind.

Such a config cannot say fewer heads of the same size. The tensors that heads lie on are those that follow the hidden
width inside attention (see `residual`), whole heads changing places to find out how fused projections hold them. The
numbers that a running module keeps of its heads are the attributes that double when heads and width do. That a module
computes without some heads, once its tensors are cut and these numbers set, is tried on a tiny model, through the very
function that fits a module to a pruned checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aicompress.errors import CheckpointError
from aicompress.model import hf
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.attention import KEY_FIELDS, Attention, HeadCount, HeadRun, HeadTensor
from aicompress.model.architecture.config_fields import Path, fields, value_at, with_value
from aicompress.model.architecture.feed_forward import Coupling
from aicompress.model.architecture.fused_heads import positions, query_positions
from aicompress.model.architecture.hidden_width import FIELDS, HEAD_COUNTS, Residual, residual, small, with_width
from aicompress.model.architecture.layer_groups import by_reader
from aicompress.model.architecture.shapes import build, is_taken, shapes_of
from aicompress.model.architecture.small_models import tiny_model
from aicompress.model.architecture.small_models.tiny_inputs import inputs_of
from aicompress.model.loading.definitions.definition import refusing
from aicompress.weights import TensorSpec

LAYOUTS: tuple[tiny_model.Layout, ...] = ("sections", "together")
UNSAID = "config.json cannot say fewer heads: their size follows from their number"
NUMBERED = "each head computes by its number among all, as ALiBi slopes go: without some, the others would change"
FITTED = (".weight", ".bias")  # what a layer is given in the shapes of a checkpoint
HINT = "prune feed-forward neurons (width) or whole blocks (depth) of this architecture"


def attentions_in_width(architecture: Architecture, grouped: bool) -> list[Attention]:
    """Every attention whose heads share the hidden width.

    Args:
        architecture: of the checkpoint.
        grouped: what goes are whole groups of heads that share a key; otherwise query heads, as many of every group.

    Raises:
        CheckpointError: how its heads lie cannot be told, or it does not compute without some of them.
    """
    counts = [path for path in fields(architecture.config, HEAD_COUNTS) if value_at(architecture.config, path)]
    if not counts:
        raise CheckpointError(f"config.json counts no attention heads under a known name ({HEAD_COUNTS[0]}, ...)", HINT)
    sections = dict.fromkeys(path[:-1] for path in counts)
    attentions = [
        attention
        for level in sections
        if _governs(architecture, level)
        for attention in _of(architecture, [path for path in counts if path[:-1] == level], grouped)
    ]
    if not attentions:
        raise CheckpointError(UNSAID, HINT)
    return attentions


def _governs(architecture: Architecture, level: Path) -> bool:
    """Whether a section sets any tensor's width: an image classifier of CLIP has a section of text, and no text."""
    widths = [field for field in fields(architecture.config, FIELDS) if field[:-1] == level]
    wider = [with_width(architecture.config, field, 2 * value_at(architecture.config, field)) for field in widths]
    taken = [config for config in wider if is_taken(config)]
    return len(taken) < len(wider) or not widths or any(shapes_of(config) != architecture.shapes for config in taken)


def _of(architecture: Architecture, counts: list[Path], grouped: bool) -> list[Attention]:
    """Attentions of a section of config.json, whose counts of heads, such as an encoder's and a decoder's, agree.

    Raises:
        CheckpointError: how their heads lie cannot be told, or they do not compute without some of them.
    """
    hidden, layout = _located(architecture, counts[0][:-1])
    if not hidden.inner or any(hidden.heads != value_at(architecture.config, path) for path in counts):
        raise CheckpointError(f"{UNSAID}, and where they lie cannot be told", HINT)
    if not grouped and layout == "together" and hidden.groups < hidden.heads:
        message = "query heads lie beside the key of their group, and cannot go without it"
        raise CheckpointError(message, "choose unit: group")
    way = _Way(layout, tuple(counts), grouped or hidden.groups == hidden.heads)
    attentions = _attentions(architecture, hidden, way)
    reduced = small(hidden.config, hidden.field, tiny_model.NARROW * hidden.heads)
    model = build(reduced)
    shapes = {architecture.on_disk(name): shape for name, shape in shapes_of(reduced).items()}
    tried = Architecture(reduced, {name: TensorSpec(torch.float32, shape) for name, shape in shapes.items()})
    inner = tuple(coupling for coupling in hidden.inner if coupling.tensor in shapes)
    few = replace(hidden, width=tiny_model.NARROW * hidden.heads, config=reduced, inner=inner)
    for attention in attentions:
        odd = next((tensor.tensor for tensor in attention.tensors if not tensor.tensor.endswith(FITTED)), None)
        if odd is not None:
            raise CheckpointError(f"{UNSAID}, and {odd} is no weight of a layer, which could be given fewer", HINT)
    if not _computes(model, tried, _attentions(tried, few, way), way.grouped):
        raise CheckpointError(f"{UNSAID}, and its attention does not compute without some of them", HINT)
    return attentions


@dataclass(frozen=True)
class _Way:
    """How heads lie and go.

    Attributes:
        layout: as a trial has confirmed it.
        counts: fields of config.json that count them.
        grouped: whole groups go, not query heads.
    """

    layout: tiny_model.Layout
    counts: tuple[Path, ...]
    grouped: bool


def counted(attention: Attention, kept: int, of: int) -> dict[str, dict[str, int]]:
    """What the manifest says of an attention that keeps some of its units: numbers of modules, and the cut layers."""
    numbers = {
        path: {key: whole * kept // of for key, whole in counts.items()} for path, counts in attention.counts.items()
    }
    return {**numbers, **{tensor.tensor.rpartition(".")[0]: {} for tensor in attention.tensors}}


def _located(architecture: Architecture, level: Path) -> tuple[Residual, tiny_model.Layout]:
    """Where heads lie, and how.

    Raises:
        CheckpointError: no layout fits.
    """
    reason = ""
    for layout in LAYOUTS:
        try:
            return residual(architecture, layout, level), layout
        except CheckpointError as error:
            reason = error.message.removeprefix("the hidden width cannot be narrowed: ")
    single = _module_of_a_head(architecture, level)
    if single is not None:
        raise CheckpointError(f"{UNSAID}, and {single} holds a module for every head", HINT)
    if any(_lie_so(architecture, layout, level) for layout in tiny_model.OF_ENTRIES):
        raise CheckpointError(NUMBERED, HINT)
    raise CheckpointError(f"{UNSAID} ({reason})", HINT)


def _lie_so(architecture: Architecture, layout: tiny_model.Layout, level: Path) -> bool:
    """Whether heads lie in a layout, changing places or not."""
    try:
        return bool(residual(architecture, layout, level).inner)
    except CheckpointError:
        return False


def _attentions(architecture: Architecture, hidden: Residual, way: _Way) -> list[Attention]:
    count = HeadCount(way.counts[0], None, (), hidden.heads, hidden.groups, hidden.width // hidden.heads)
    numbers = _numbers(architecture, hidden, way)
    attentions = []
    for name, group in by_reader(hidden.inner):
        owners = {coupling.tensor.rpartition(".")[0].rpartition(".")[0] for coupling in group}
        held = {path: each for path, each in numbers.items() if path in owners}
        tensors = tuple(_tensor(coupling, count, way.layout) for coupling in group)
        attentions.append(Attention(name, count, tensors, held))
    return attentions


def _tensor(coupling: Coupling, count: HeadCount, layout: tiny_model.Layout) -> HeadTensor:
    each, sections = count.heads // count.groups, list[HeadRun]()
    for span in tiny_model.Sharing(count.heads, count.groups, layout).spans(coupling.parts):
        queries = span % each == 0 and layout == "sections"
        sections.append(HeadRun("query", count.width) if queries else HeadRun("key", count.width * span))
    return HeadTensor(coupling.tensor, coupling.axis, tuple(sections), coupling.role)


def _numbers(architecture: Architecture, hidden: Residual, way: _Way) -> dict[str, dict[str, int]]:
    """Attributes of modules without weights that double with heads and width together."""
    keys = _key_counts(hidden.config, hidden.field[:-1]) if way.grouped else ()
    double = dict(_doubled(hidden.config, hidden.field, (*way.counts, *keys)).named_modules())
    units = hidden.groups if way.grouped else hidden.heads // hidden.groups
    numbers: dict[str, dict[str, int]] = {}
    for name, module in build(hidden.config).named_modules():
        more = vars(double[name])
        plain = {key: value for key, value in vars(module).items() if type(value) is int and not key.startswith("_")}
        grown = {key: value for key, value in plain.items() if value and more.get(key) == 2 * value}
        if grown and not module._parameters and all(value % units == 0 for value in grown.values()):
            module_name = architecture.on_disk(f"{name}.weight").removesuffix(".weight")
            numbers[module_name] = grown
    return numbers


def _doubled(config: Mapping[str, Any], width: Path, counts: Iterable[Path]) -> Any:
    """A model of twice the hidden width and twice as many heads, of the same size."""
    config = with_width(config, width, 2 * value_at(config, width))
    for path in counts:
        config = with_value(config, path, 2 * value_at(config, path))
    return build(config)


def _module_of_a_head(architecture: Architecture, level: Path) -> str | None:
    """A list of modules that holds one for every head, such as a norm of its own; None where there is none."""
    config, names = architecture.config, {name for name, _ in architecture.model.named_parameters()}
    counted_here = [path for path in fields(config, (*FIELDS, *HEAD_COUNTS)) if path[:-1] == level]
    width, *queries = [path for path in counted_here if value_at(config, path)]
    try:
        double = _doubled(config, width, [*queries, *_key_counts(config, level)])
    except CheckpointError:  # strict configurations do not take every number
        return None
    more = next((name for name, _ in double.named_parameters() if name not in names), None)
    return None if more is None else more.rsplit(".", 2)[0]


def _key_counts(config: Mapping[str, Any], level: Path) -> list[Path]:
    """Fields that count the keys of a section of config.json, in it or below it where no width is set."""
    inside = [path for path in fields(config, KEY_FIELDS) if path[: len(level)] == level and value_at(config, path)]
    return [path for path in inside if path[:-1] == level or not set(value_at(config, path[:-1])) & set(FIELDS)]


def _computes(model: Any, architecture: Architecture, attentions: Sequence[Attention], grouped: bool) -> bool:
    """Whether a tiny model gives without some heads of every attention what it gives with these heads silent."""
    wide = tiny_model.in_memory(model)
    inputs, generator = inputs_of(wide), torch.Generator().manual_seed(2)
    tiny_model.randomize(wide)
    names = {architecture.on_disk(name): name for name, _ in wide.named_parameters()}
    cut: dict[str, Tensor] = {}
    widths: dict[str, dict[str, int]] = {}
    for attention in attentions:
        count = attention.count
        units = count.groups if grouped else count.heads // count.groups  # of each group
        kept = torch.randperm(units, generator=generator)[: max(1, units // 2)].sort().values
        widths |= counted(attention, len(kept), units)
        for tensor in attention.tensors:
            if tensor.tensor not in names:
                return False
            value = wide.get_parameter(names[tensor.tensor])
            stays = positions(tensor, kept, count) if grouped else query_positions(tensor, kept, count)
            cut[tensor.tensor] = value.index_select(tensor.axis, stays)
            if tensor.role == "consumer":
                gone = torch.ones(value.shape[tensor.axis], dtype=torch.bool).index_fill_(0, stays, False)
                value.index_fill_(tensor.axis, gone.nonzero()[:, 0], 0.0)
    try:
        few = _fitted(wide, widths, {names[name]: name for name in cut}, cut)
        pairs = zip(tiny_model.outputs_of(wide, inputs), tiny_model.outputs_of(few, inputs), strict=True)
        return all(one.shape == other.shape and torch.allclose(one, other) for one, other in pairs)
    except CheckpointError:
        return False


def _fitted(
    wide: Any, widths: Mapping[str, Mapping[str, int]], names: Mapping[str, str], cut: Mapping[str, Tensor]
) -> Any:
    """A copy that was fitted to the cut tensors as a pruned checkpoint's model is, and holds them."""
    with refusing("a small model cannot be given fewer heads"):
        few = copy.deepcopy(wide)
        hf.fit_shapes(few, widths, {name: tuple(value.shape) for name, value in cut.items()})
    few.requires_grad_(False)
    for name, disk in names.items():
        few.get_parameter(name).copy_(cut[disk])
    return few
