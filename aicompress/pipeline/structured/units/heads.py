"""Attention heads: rows of the projections that make them, and columns of the one that reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError, RecipeError
from aicompress.methods.prune.heads import Heads
from aicompress.methods.structural import Part, Structure
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.attention import Attention, HeadTensor, attentions
from aicompress.model.architecture.attention_in_width import attentions_in_width, counted
from aicompress.model.architecture.borrowed_keys import coupled
from aicompress.model.architecture.config_fields import value_at
from aicompress.model.architecture.fused_heads import lies_in_sections
from aicompress.model.architecture.shapes import changed, is_taken
from aicompress.pipeline.structured.edit import Cut, Edit, ParameterChange
from aicompress.pipeline.structured.parts import offset_part, part
from aicompress.pipeline.structured.unit import Kept, StructuralUnit, UnitLayout, in_stack, require_axis


@dataclass(frozen=True)
class AttentionLayout(UnitLayout):
    """Attentions of an architecture, a structure for each.

    Attributes:
        attentions: in the order of the structures; attentions that share keys and values are one.
        grouped: a unit is a key-value group with its query heads, not a query head.
    """

    attentions: Sequence[Attention]
    grouped: bool


class HeadUnit(StructuralUnit[Heads, AttentionLayout]):
    """Heads of attentions."""

    kind = Heads

    def find(self, checkpoint: Checkpoint, unit: Heads, stack: str | None) -> AttentionLayout:
        """Every attention of the stack.

        Raises:
            Refused: the checkpoint does not hold what config.json says, or how heads lie cannot be told.
        """
        architecture = Architecture.of(checkpoint.config, checkpoint.parameters())
        chosen = _separate(architecture, unit, stack)
        structures = tuple(_structure(checkpoint, attention, unit.grouped) for attention in chosen)
        return AttentionLayout(structures, architecture, chosen, unit.grouped)

    def require_statistics(self, layout: AttentionLayout, reads: frozenset[str]) -> None:
        """Attentions that share keys lie in several blocks, and statistics are read block by block.

        Raises:
            RecipeError: some do.
        """
        for structure in layout.structures if reads - {"gradients"} else ():
            readers = structure.of("consumer")
            if len(readers) > 1:
                raise RecipeError(
                    f"{readers[0].module[:-3]} and {readers[1].module[:-3]} share keys and values: their heads cannot "
                    "be chosen by statistics",
                    "choose them by weights, as prune/heads-norm does",
                )

    def edit(self, layout: AttentionLayout, sizes: Sequence[int], kept: Kept) -> Edit:
        """Cut the projections of every attention; config.json has the number of heads.

        Where config.json cannot say fewer heads of this size, it keeps their number and the manifest says what stays.

        Raises:
            RecipeError: transformers does not take the number.
        """
        structures, architecture = layout.structures, layout.architecture
        edited, widths = architecture.config, dict[str, dict[str, int]]()
        for attention, structure, size in zip(layout.attentions, structures, sizes, strict=True):
            if not attention.count.size:
                widths |= counted(attention, size, structure.size) if size < structure.size else {}
                continue
            groups = size if layout.grouped else attention.count.groups
            edited = attention.count.edited(edited, size * structure.worth, groups)
        if not widths:
            _require_valid(architecture, edited, layout.attentions[0], structures[0])
        unchanged = not any(size < s.size for s, size in zip(structures, sizes, strict=True))
        config_json = architecture.config if unchanged else edited
        warnings = () if not unchanged else _nothing(structures[0])
        if widths:
            heads = sizes[0] * structures[0].worth
            warnings = (
                f"config.json cannot say {heads} heads of this size: loads with aicompress, and in transformers "
                "with trust_remote_code",
            )
        return Edit(dict(config_json), structures, tuple(sizes), _changes(layout, sizes), warnings, widths=widths)


def _united(attentions: Sequence[Attention]) -> Attention:
    """Attentions that share keys and values as one: the same groups stay in all of them."""
    tensors = tuple(tensor for attention in attentions for tensor in attention.tensors)
    counts = {path: numbers for attention in attentions for path, numbers in attention.counts.items()}
    return replace(attentions[0], tensors=tensors, counts=counts)


def _changes(layout: AttentionLayout, sizes: Sequence[int]) -> dict[str, ParameterChange]:
    changes = {name: ParameterChange(name) for name in layout.architecture.specs}
    for number, (attention, structure, size) in enumerate(
        zip(layout.attentions, layout.structures, sizes, strict=True)
    ):
        heads = f"{size * structure.worth} of {attention.count.heads}"
        for tensor in attention.tensors if size < structure.size else ():
            cuts = tuple(_cuts(attention, tensor, number, layout.grouped))
            if cuts:
                changes[tensor.tensor] = ParameterChange(tensor.tensor, cuts, {Heads.plural: heads})
    return changes


def _nothing(structure: Structure) -> tuple[str, ...]:
    if structure.size == 1 and structure.worth > 1:
        return (f"no head goes: all {structure.worth} of {structure.name} share one key; choose unit: query",)
    return (f"no head goes: {structure.name} has {structure.size} units, and the share rounds to all of them",)


@lru_cache(maxsize=16)
def _separate(architecture: Architecture, unit: Heads, stack: str | None) -> tuple[Attention, ...]:
    """Attentions of the stack; keys and values go with the heads that read them. A step asks several times."""
    chosen = _chosen(architecture, unit, stack)
    if not unit.grouped:
        return tuple(chosen)
    return tuple(_united([chosen[number] for number in group]) for group in coupled(architecture, chosen))


def _chosen(architecture: Architecture, unit: Heads, stack: str | None) -> list[Attention]:
    every = attentions(architecture) or attentions_in_width(architecture, unit.grouped)
    chosen = in_stack(every, stack, "attention", "counts the heads of")
    for attention in chosen:
        _require_whole(architecture, attention)
    fused = [a for a in chosen if a.count.size and any(_is_fused(a, tensor) for tensor in a.tensors)]
    if fused and not lies_in_sections(architecture, fused[0]):
        raise CheckpointError(
            f"{fused[0].name}: how heads lie in its fused projection cannot be told", "its heads cannot be pruned"
        )
    return chosen


def _is_fused(attention: Attention, tensor: HeadTensor) -> bool:
    """Whether several things may lie on an axis of heads: the order of these is tried."""
    spans = {section.span for section in tensor.sections}
    return len(tensor.sections) > 1 or not spans <= {1, attention.count.width}


def _require_whole(architecture: Architecture, attention: Attention) -> None:
    """Heads must be made and read in one place, by tensors that the checkpoint has.

    Raises:
        CheckpointError: they are not.
    """
    readers = [t for t in attention.tensors if t.role == "consumer"]
    if len(readers) != 1 or len(attention.tensors) == 1:
        odd = (readers or list(attention.tensors))[-1].tensor
        raise CheckpointError(
            f"{odd} holds something for every head beside the projections of one attention",
            "heads of layers that share it cannot go one by one",
        )
    for tensor in attention.tensors:
        length = sum(s.span * _number(attention, s.kind) for s in tensor.sections)
        said = f"config.json says {attention.count.heads} heads"
        require_axis(architecture.specs, tensor.tensor, tensor.axis, length, said)


def _number(attention: Attention, kind: str) -> int:
    return attention.count.heads if kind == "query" else attention.count.groups


def _structure(checkpoint: Checkpoint, attention: Attention, grouped: bool) -> Structure:
    """Units are groups, or query heads which lie in groups."""
    count = attention.count
    parts = tuple(part for tensor in attention.tensors for part in _parts(checkpoint, attention, tensor, grouped))
    name = next(t.tensor for t in attention.tensors if t.role == "consumer").rpartition(".")[0].rpartition(".")[0]
    if grouped:
        return Structure(name, count.groups, parts, worth=count.heads // count.groups)
    return Structure(name, count.heads, parts, groups=count.groups)


def _cuts(attention: Attention, tensor: HeadTensor, number: int, grouped: bool) -> Iterable[Cut]:
    if grouped:
        yield Cut(number, tensor.axis, tuple(_span(attention, s.kind, s.span, grouped) for s in tensor.sections))
        return
    begin = 0
    for section in tensor.sections:
        if section.kind == "query":
            yield Cut(number, tensor.axis, (section.span,), begin)
        begin += section.span * _number(attention, section.kind)


def _span(attention: Attention, kind: str, span: int, grouped: bool) -> int:
    """Entries of a unit: a group holds several query heads."""
    return span * (attention.count.heads // attention.count.groups) if grouped and kind == "query" else span


def _parts(checkpoint: Checkpoint, attention: Attention, tensor: HeadTensor, grouped: bool) -> Iterable[Part]:
    """The units' slices of a tensor, (units, numbers); a fused tensor gives several."""
    module, begin = tensor.tensor.rpartition(".")[0], 0
    units = attention.count.groups if grouped else attention.count.heads
    for number, section in enumerate(tensor.sections):
        length = section.span * _number(attention, section.kind)
        if grouped or section.kind == "query":
            take = partial(_taken, tensor.axis, (begin, length), units)
            span, place = _span(attention, section.kind, section.span, grouped), f"{module}[{number}]"
            yield part(checkpoint, tensor.tensor, place, tensor.role, take, (tensor.axis,), span=span)
        begin += length
    if tensor.role == "consumer":
        yield from offset_part(checkpoint, tensor.tensor)


def _taken(axis: int, where: tuple[int, int], units: int, tensor: Tensor) -> Tensor:
    begin, length = where
    return tensor.movedim(axis, 0)[begin : begin + length].reshape(units, -1)


def _require_valid(
    architecture: Architecture, edited: dict[str, Any], attention: Attention, structure: Structure
) -> None:
    """transformers must take the new numbers.

    Raises:
        RecipeError: it does not; the hint names the numbers that it takes.
    """
    heads = value_at(edited, attention.count.query)
    try:
        changed(edited, f"transformers makes no model of {heads} heads an attention", "")
    except CheckpointError as error:
        fits = list(_fitting(architecture, attention, structure))
        hint = f"these numbers of heads fit: {', '.join(map(str, fits))}" if fits else "no smaller number of heads fits"
        raise RecipeError(error.message, hint) from error


def _fitting(architecture: Architecture, attention: Attention, structure: Structure) -> Sequence[int]:
    """Numbers of query heads below the present one that transformers takes."""
    count, fitting = attention.count, []
    for units in range(structure.groups, structure.size, structure.groups):
        heads, groups = units * structure.worth, units if structure.groups == 1 else count.groups
        if is_taken(count.edited(architecture.config, heads, groups)):
            fitting.append(heads)
    return fitting


UNIT = HeadUnit()
