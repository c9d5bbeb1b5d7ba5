"""Locate heads where the head size is the hidden width over their number: BERT, GPT-2, GPT-NeoX and their kind.

Such a config cannot say fewer heads of the same size. The tensors that heads lie on are those that follow the hidden
width inside attention (see `residual`), whole heads changing places to find out how fused projections hold them. The
numbers that a running module keeps of its heads are the attributes that double when heads and width do. That a module
computes without some heads, once its tensors are cut and these numbers set, is tried on a miniature, through the very
function that fits a module to a pruned checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aicompress.errors import CheckpointError
from aicompress.model import hf
from aicompress.model.architecture import tiny_model as miniature
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.attention import Attention, HeadCount, HeadTensor, Section
from aicompress.model.architecture.config_fields import Path, fields, value_at, with_value
from aicompress.model.architecture.feed_forward import Coupling
from aicompress.model.architecture.fused_heads import positions
from aicompress.model.architecture.hidden_width import FIELDS, HEAD_COUNTS, Residual, residual, small, with_width
from aicompress.model.architecture.layer_groups import by_reader
from aicompress.model.architecture.shapes import build, stored_shapes
from aicompress.weights import TensorSpec

LAYOUTS: tuple[miniature.Layout, ...] = ("sections", "together")
UNSAID = "config.json cannot say fewer heads: their size follows from their number"
HINT = "prune feed-forward neurons (width) or whole blocks (depth) of this architecture"


def attentions_in_width(architecture: Architecture) -> list[Attention]:
    """Every attention whose heads share the hidden width.

    Raises:
        CheckpointError: how its heads lie cannot be told, or it does not compute without some of them.
    """
    counts = [path for path in fields(architecture.config, HEAD_COUNTS) if value_at(architecture.config, path)]
    if not counts:
        raise CheckpointError(UNSAID, HINT)
    sections = dict.fromkeys(path[:-1] for path in counts)
    attentions = [
        attention
        for level in sections
        if _governs(architecture, level)
        for attention in _of(architecture, [path for path in counts if path[:-1] == level])
    ]
    if not attentions:
        raise CheckpointError(UNSAID, HINT)
    return attentions


def _governs(architecture: Architecture, level: Path) -> bool:
    """Whether a section sets any tensor's width: an image classifier of CLIP has a section of text, and no text."""
    widths = [field for field in fields(architecture.config, FIELDS) if field[:-1] == level]
    wider = (with_width(architecture.config, field, 2 * value_at(architecture.config, field)) for field in widths)
    return not widths or any(stored_shapes(build(config)) != architecture.shapes for config in wider)


def _of(architecture: Architecture, counts: list[Path]) -> list[Attention]:
    """Attentions of a section of config.json, whose counts of heads, such as an encoder's and a decoder's, agree.

    Raises:
        CheckpointError: how their heads lie cannot be told, or they do not compute without some of them.
    """
    hidden, layout = _located(architecture, counts[0][:-1])
    if not hidden.inner or any(hidden.heads != value_at(architecture.config, path) for path in counts):
        raise CheckpointError(f"{UNSAID}, and where they lie cannot be told", HINT)
    attentions = _attentions(architecture, hidden, layout, counts)
    reduced = small(hidden.config, hidden.field, miniature.NARROW * hidden.heads)
    model = build(reduced)
    shapes = {architecture.on_disk(name): shape for name, shape in stored_shapes(model).items()}
    tried = Architecture(reduced, {name: TensorSpec(torch.float32, shape) for name, shape in shapes.items()})
    inner = tuple(coupling for coupling in hidden.inner if coupling.tensor in shapes)
    few = replace(hidden, width=miniature.NARROW * hidden.heads, config=reduced, inner=inner)
    if not _computes(model, tried, _attentions(tried, few, layout, counts)):
        raise CheckpointError(f"{UNSAID}, and its attention does not compute without some of them", HINT)
    return attentions


def counted(attention: Attention, heads: int) -> dict[str, dict[str, int]]:
    """What the manifest says of an attention with so many heads: numbers of its modules, and the cut layers."""
    numbers = {path: {key: each * heads for key, each in counts.items()} for path, counts in attention.counts.items()}
    return {**numbers, **{tensor.tensor.rpartition(".")[0]: {} for tensor in attention.tensors}}


def _located(architecture: Architecture, level: Path) -> tuple[Residual, miniature.Layout]:
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
    raise CheckpointError(f"{UNSAID} ({reason})", HINT)


def _attentions(
    architecture: Architecture, hidden: Residual, layout: miniature.Layout, counts: list[Path]
) -> list[Attention]:
    count = HeadCount(counts[0], None, (), hidden.heads, hidden.heads, hidden.width // hidden.heads)
    numbers = _numbers(architecture, hidden, counts)
    attentions = []
    for name, group in by_reader(hidden.inner):
        owners = {coupling.tensor.rpartition(".")[0].rpartition(".")[0] for coupling in group}
        held = {path: each for path, each in numbers.items() if path in owners}
        attentions.append(Attention(name, count, tuple(_tensor(c, count, layout) for c in group), held))
    return attentions


def _tensor(coupling: Coupling, count: HeadCount, layout: miniature.Layout) -> HeadTensor:
    sections = (Section("query", count.width),) * coupling.parts
    if layout == "together":
        sections = (Section("query", count.width * coupling.parts),)
    return HeadTensor(coupling.tensor, coupling.axis, sections, coupling.role)


def _numbers(architecture: Architecture, hidden: Residual, counts: list[Path]) -> dict[str, dict[str, int]]:
    """Attributes of modules without weights that double with heads and width together, over the number of heads."""
    config: Mapping[str, Any] = with_width(hidden.config, hidden.field, 2 * hidden.width)
    for path in counts:
        config = with_value(config, path, 2 * hidden.heads)
    double = dict(build(config).named_modules())
    numbers: dict[str, dict[str, int]] = {}
    for name, module in build(hidden.config).named_modules():
        more = vars(double[name])
        plain = {key: value for key, value in vars(module).items() if type(value) is int and not key.startswith("_")}
        grown = {key: value for key, value in plain.items() if value and more.get(key) == 2 * value}
        if grown and not module._parameters and all(value % hidden.heads == 0 for value in grown.values()):
            module_name = architecture.on_disk(f"{name}.weight").removesuffix(".weight")
            numbers[module_name] = {key: value // hidden.heads for key, value in grown.items()}
    return numbers


def _computes(model: Any, architecture: Architecture, attentions: Sequence[Attention]) -> bool:
    """Whether a miniature gives without some heads of every attention what it gives with these heads silent."""
    wide = miniature.in_memory(model)
    inputs, generator = miniature.inputs_of(wide), torch.Generator().manual_seed(2)
    miniature.randomize(wide)
    names = {architecture.on_disk(name): name for name, _ in wide.named_parameters()}
    cut: dict[str, Tensor] = {}
    widths: dict[str, dict[str, int]] = {}
    for attention in attentions:
        heads = attention.count.heads
        kept = torch.randperm(heads, generator=generator)[: max(1, heads // 2)].sort().values
        widths |= counted(attention, len(kept))
        for tensor in attention.tensors:
            if tensor.tensor not in names:
                return False
            value = wide.get_parameter(names[tensor.tensor])
            stays = positions(tensor, kept, attention.count)
            cut[tensor.tensor] = value.index_select(tensor.axis, stays)
            if tensor.role == "consumer":
                gone = torch.ones(value.shape[tensor.axis], dtype=torch.bool).index_fill_(0, stays, False)
                value.index_fill_(tensor.axis, gone.nonzero()[:, 0], 0.0)
    few = _fitted(wide, widths, {names[name]: name for name in cut}, cut)
    try:
        pairs = zip(miniature.outputs_of(wide, inputs), miniature.outputs_of(few, inputs), strict=True)
        return all(one.shape == other.shape and torch.allclose(one, other) for one, other in pairs)
    except CheckpointError:
        return False


def _fitted(
    wide: Any, widths: Mapping[str, Mapping[str, int]], names: Mapping[str, str], cut: Mapping[str, Tensor]
) -> Any:
    """A copy that was fitted to the cut tensors as a pruned checkpoint's model is, and holds them."""
    few = copy.deepcopy(wide)
    hf.fit_shapes(few, widths, {name: tuple(value.shape) for name, value in cut.items()})
    few.requires_grad_(False)
    for name, disk in names.items():
        few.get_parameter(name).copy_(cut[disk])
    return few
