"""Whole blocks of a stack: those that stay are numbered anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.naming import kind_of, layer_name
from aicompress.errors import CheckpointError, RecipeError
from aicompress.layer import LayerInfo
from aicompress.methods.prune.depth import Blocks
from aicompress.methods.structural import Part, Structure
from aicompress.model.architecture.architecture import Architecture, Stack, keep_blocks
from aicompress.model.architecture.shapes import block_traits, build, changed
from aicompress.pipeline.calibration.request import Step
from aicompress.pipeline.step.checks import known_kinds
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.structured.edit import Edit, ParameterChange
from aicompress.pipeline.structured.parts import as_one_row, part
from aicompress.pipeline.structured.unit import Kept, Scores, StructuralUnit, UnitLayout
from aicompress.pipeline.structured.units.block_scores import BlockScores


@dataclass(frozen=True)
class StackLayout(UnitLayout):
    """One stack of blocks, which is the only structure.

    Attributes:
        stack: the stack.
        one_by_one: influence is measured anew after every block that goes.
    """

    stack: Stack
    one_by_one: bool


class BlockUnit(StructuralUnit[Blocks, StackLayout]):
    """Whole blocks of a stack."""

    kind = Blocks
    scored = True

    def find(self, checkpoint: Checkpoint, unit: Blocks, stack: str | None) -> StackLayout:
        """The stack of the model, or the one that is asked for.

        Raises:
            Refused: there is no such stack.
        """
        architecture = Architecture.of(checkpoint.config, checkpoint.parameters())
        chosen = _chosen_stack(architecture, stack)
        structure = Structure(chosen.name, chosen.size, tuple(_block_parts(checkpoint, chosen)))
        return StackLayout((structure,), architecture, chosen, unit.one_by_one)

    def interchangeable(self, checkpoint: Checkpoint, layout: StackLayout) -> bool:
        """Blocks are not: config.json lists kinds of blocks, and some compute by their number."""
        return False

    def scored_layers(self, checkpoint: Checkpoint, layout: StackLayout) -> list[LayerInfo]:
        """Every layer of the blocks."""
        infos = checkpoint.layers(known_kinds(checkpoint)[0])
        inside = [info for info in infos if layout.stack.block_of(info.tensor) is not None]
        return [info for info in inside if info.kind != "experts"]  # no gradient of theirs is taken

    def scores(
        self,
        layout: StackLayout,
        sizes: Sequence[int],
        measurement: Step,
        reads: frozenset[str],
        progress: Progress,
    ) -> Scores:
        """Influence of the blocks, or w² E[g²] over their matrices."""
        scores = BlockScores(measurement, layout.stack, progress)
        if "gradients" in reads:
            importance = scores.gradients()
        else:
            importance = scores.influences(layout.stack.size - sizes[0] if layout.one_by_one else 0)
        return (importance,), scores.record()

    def edit(self, layout: StackLayout, sizes: Sequence[int], kept: Kept) -> Edit:
        """Drop the tensors of the other blocks, and rename those of the blocks that stay.

        Raises:
            CheckpointError: the blocks that stay would compute otherwise in their new places.
        """
        architecture, stack, blocks = layout.architecture, layout.stack, list(kept[0])
        edited = keep_blocks(architecture.config, stack.field, blocks)
        told = f"transformers makes no model of {len(blocks)} of the {stack.size} blocks of {stack.name}"
        fewer = changed(edited, told, "keep others of them, or more")
        _require_same_blocks(build(architecture.config), fewer, stack, blocks)
        changes, carried = _renumbered(architecture, edited, stack, blocks)
        warnings = [
            f"{name} exists in the first block only: it moved to block {blocks[0]}, now the first" for name in carried
        ]
        dropped = ", ".join(str(block) for block in range(stack.size) if block not in blocks)
        told = f"{stack.name}: dropped block{'s' if ',' in dropped else ''} {dropped} of {stack.size}"
        notes = (told,) if dropped else ()
        return Edit(edited, layout.structures, tuple(sizes), changes, tuple(warnings), notes, kept=kept)

    @contextmanager
    def silent(
        self, model: Any, layout: StackLayout, kept: Mapping[int, Tensor], inputs: Mapping[str, Tensor]
    ) -> Iterator[None]:
        """Let blocks that go give the states that they were given."""
        lists = [
            module
            for module in model.modules()
            if isinstance(module, nn.ModuleList) and len(module) == layout.stack.size
        ]
        if len(lists) != len(layout.stack.prefixes):
            raise CheckpointError(f"which modules are the blocks of {layout.stack.name} cannot be told")
        gone = [block for block in range(layout.stack.size) if block not in kept[0].tolist()]
        hooks = [blocks[block].register_forward_hook(_pass_on, with_kwargs=True) for blocks in lists for block in gone]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _pass_on(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    """The states that a block was given, in the place of those that it gives."""
    states = arguments[0] if arguments else named["hidden_states"]
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _chosen_stack(architecture: Architecture, wanted: str | None) -> Stack:
    stacks = architecture.stacks()
    names, bound = ", ".join(stack.name for stack in stacks), None if stacks else architecture.bound_to_depth()
    if bound is not None:
        message = f"blocks cannot be dropped one by one: the shape of {bound} follows their number"
        raise CheckpointError(message, "prune feed-forward neurons (width) or heads instead")
    if not stacks:
        raise CheckpointError(
            "no stack of two or more blocks whose number is set in config.json",
            "blocks that share their parameters, or stages of several sizes, cannot be dropped one by one",
        )
    if wanted is None and len(stacks) > 1:
        raise RecipeError(f"the model has {len(stacks)} stacks of blocks: {names}", "choose one with method.stack")
    chosen = next((stack for stack in stacks if wanted in (None, stack.name)), None)
    if chosen is None:
        raise RecipeError(f"method.stack: there is no stack {wanted!r}", f"the model has {names}")
    return chosen


def _block_parts(checkpoint: Checkpoint, stack: Stack) -> Iterable[Part]:
    """The matrices of each block, each as one row."""
    for name, spec in checkpoint.parameters().items():
        block = stack.block_of(name)
        if block is not None and kind_of(name, spec) is not None:
            yield part(checkpoint, name, layer_name(name), "whole", as_one_row, (), block)


def _renumbered(
    architecture: Architecture, edited: Mapping[str, Any], stack: Stack, kept: list[int]
) -> tuple[dict[str, ParameterChange], list[str]]:
    """Every tensor that stays under its new name, and those of block 0 that the new first block takes over.

    Such a tensor, T5's relative_attention_bias for one, serves the whole stack and only lives in the first block.
    Blocks behind the stack, which predict further tokens and which transformers does not load, stay behind it.
    """
    place = {block: number for number, block in enumerate(kept)}
    expected = Architecture(dict(edited), architecture.specs).names
    present = set(architecture.specs)
    changes: dict[str, ParameterChange] = {}
    carried: list[str] = []
    for name in architecture.specs:
        block = stack.block_of(name)
        if block is None:
            changes[name] = ParameterChange(name)
        elif block in place or block >= stack.size:
            number = place.get(block, block - stack.size + len(kept))
            new = stack.renumbered(name, number)
            moved = {} if new == name else {"block": f"{block}, now {number}"}
            changes[new] = ParameterChange(name, detail=moved)
        elif block == 0 and name in expected and stack.renumbered(name, kept[0]) not in present:
            changes[name] = ParameterChange(name, note="serves the whole stack: moved to the new first block")
            carried.append(name)
    return changes, carried


def _require_same_blocks(old: Any, new: Any, stack: Stack, kept: list[int]) -> None:
    """Every block of a model must compute in its new place as it did in its old one.

    Raises:
        CheckpointError: the architecture makes blocks by their number, in a way that config.json does not list.
    """
    before, after = block_traits(old), block_traits(new)
    for name, blocks in after.items():
        if len(before.get(name, [])) != stack.size or len(blocks) != len(kept):
            continue
        for place, (block, traits) in enumerate(zip(kept, blocks, strict=True)):
            earlier = before[name][block]
            for key in earlier.keys() & traits.keys():
                if earlier[key] != traits[key]:
                    moved = block != place
                    where = f"as block {place}" if moved else f"in a stack of {len(kept)}"
                    raise CheckpointError(
                        f"block {block} would compute otherwise {where}: its {key.strip('.')} would be "
                        f"{traits[key]!r}, it is {earlier[key]!r}",
                        "the architecture makes its blocks by number: drop others" if moved else _BY_COUNT,
                    )


_BY_COUNT = "the architecture makes its blocks by their number: prune heads or neurons (width) instead"
UNIT = BlockUnit()
