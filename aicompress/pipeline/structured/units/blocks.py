"""Whole blocks of a stack: which stay, and how the rest is numbered anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.naming import kind_of, layer_name
from aicompress.errors import CheckpointError, RecipeError
from aicompress.methods.structural import Part, StructuralConfig, StructuralMethod, Structure
from aicompress.model.architecture.architecture import Architecture, Stack, keep_blocks
from aicompress.model.architecture.shapes import block_traits, build
from aicompress.pipeline.calibration.requirements import Request
from aicompress.pipeline.step.checks import known_kinds
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.structured.edit import Change, Edit, read_whole
from aicompress.pipeline.structured.units.block_scores import Scoring
from aicompress.recipe import Recipe


def drop_blocks(checkpoint: Checkpoint, method: StructuralMethod, recipe: Recipe, request: Request) -> Edit:
    """Keep some blocks of one stack and number them anew.

    Which ones is decided here: names, config.json and bytes depend on it. Scores that need data run the model.

    Raises:
        Refused: no such stack, or the blocks that stay would compute otherwise in their new places.
    """
    config = recipe.method
    assert isinstance(config, StructuralConfig)
    architecture = Architecture.of(checkpoint.config, checkpoint.parameters())
    stack = _chosen_stack(architecture.stacks(), config.stack)
    structure = Structure(stack.name, stack.size, tuple(_block_parts(checkpoint, stack)))
    (size,) = method.sizes([structure], config)
    scoring = _scoring(checkpoint, recipe, request, stack)
    record: Mapping[str, Any] = {}
    if method.reads(config) and size < stack.size:
        scoring.require(method)
        structure, record = replace(structure, importance=_importance(scoring, config, size)), scoring.record()
    kept = method.keep(structure, size, config)
    edited = keep_blocks(architecture.config, stack.field, kept)
    _require_same_blocks(architecture.config, edited, stack, kept)
    changes, carried = _renumbered(architecture, edited, stack, kept)
    warnings = [
        f"{name} exists in the first block only: it moved to block {kept[0]}, now the first" for name in carried
    ]
    dropped = ", ".join(str(block) for block in range(stack.size) if block not in kept)
    if dropped:
        warnings.append(f"{stack.name}: dropped block{'s' if ',' in dropped else ''} {dropped} of {stack.size}")
    return Edit(edited, (structure,), (size,), changes, tuple(warnings), record)


def _scoring(checkpoint: Checkpoint, recipe: Recipe, request: Request, stack: Stack) -> Scoring:
    infos = checkpoint.layers(known_kinds(checkpoint)[0])
    layers = [LayerPlan(info, recipe.method) for info in infos if stack.block_of(info.tensor) is not None]
    return Scoring(checkpoint, recipe, request, stack, layers)


def _importance(scoring: Scoring, config: StructuralConfig, size: int) -> Tensor:
    """Scores of the blocks by the method's strategy."""
    if getattr(config, "strategy", "") == "taylor":
        return scoring.taylor()
    return scoring.influences(scoring.stack.size - size if getattr(config, "one_by_one", False) else 0)


def _chosen_stack(stacks: list[Stack], wanted: str | None) -> Stack:
    names = ", ".join(stack.name for stack in stacks)
    if not stacks:
        raise CheckpointError(
            "no stack of two or more blocks whose number is set in config.json",
            "blocks that share their parameters, or stages of several sizes, cannot be dropped one by one",
        )
    if wanted is None and len(stacks) > 1:
        raise RecipeError(f"the model has {len(stacks)} stacks of blocks: {names}", "choose one with method.stack")
    found = [stack for stack in stacks if wanted in (None, stack.name)]
    if not found:
        raise RecipeError(f"method.stack: there is no stack {wanted!r}", f"the model has {names}")
    return found[0]


def _block_parts(checkpoint: Checkpoint, stack: Stack) -> Iterable[Part]:
    """The matrices of each block, each as one row."""
    for name, spec in checkpoint.parameters().items():
        block = stack.block_of(name)
        if block is not None and kind_of(name, spec) is not None:
            read = partial(read_whole, checkpoint, name)
            yield Part(name, layer_name(name), "whole", block, read)


def _renumbered(
    architecture: Architecture, edited: Mapping[str, Any], stack: Stack, kept: list[int]
) -> tuple[dict[str, Change], list[str]]:
    """Every tensor that stays under its new name, and those of block 0 that the new first block takes over.

    Such a tensor, T5's relative_attention_bias for one, serves the whole stack and only lives in the first block.
    """
    place = {block: number for number, block in enumerate(kept)}
    expected = Architecture(dict(edited), architecture.specs).names
    present = set(architecture.specs)
    changes: dict[str, Change] = {}
    carried: list[str] = []
    for name in architecture.specs:
        block = stack.block_of(name)
        if block is None:
            changes[name] = Change(name)
        elif block in place:
            new = stack.renumbered(name, place[block])
            moved = {} if new == name else {"block": f"{block}, now {place[block]}"}
            changes[new] = Change(name, detail=moved)
        elif block == 0 and name in expected and stack.renumbered(name, kept[0]) not in present:
            changes[name] = Change(name, note="serves the whole stack: moved to the new first block")
            carried.append(name)
    return changes, carried


def _require_same_blocks(old: Mapping[str, Any], new: Mapping[str, Any], stack: Stack, kept: list[int]) -> None:
    """Every block must compute in its new place as it did in its old one.

    Raises:
        CheckpointError: the architecture makes blocks by their number, in a way that config.json does not list.
    """
    before, after = block_traits(build(old)), block_traits(build(new))
    for name, blocks in after.items():
        if len(before.get(name, [])) != stack.size or len(blocks) != len(kept):
            continue
        for place, (block, traits) in enumerate(zip(kept, blocks, strict=True)):
            earlier = before[name][block]
            for key in earlier.keys() & traits.keys():
                if earlier[key] != traits[key]:
                    raise CheckpointError(
                        f"block {block} would compute otherwise as block {place}: its {key.strip('.')} would be "
                        f"{traits[key]!r}, it is {earlier[key]!r}",
                        "the architecture makes its blocks by number: drop others",
                    )
