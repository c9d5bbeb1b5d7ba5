"""What a structural step changes: which tensors go, which are cut or renamed, and how config.json follows.

An edit is worked out from headers alone; it is not carried out here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.naming import kind_of, layer_name
from aicompress.errors import CheckpointError, RecipeError
from aicompress.methods.structural import Part, StructuralConfig, StructuralMethod, Structure
from aicompress.model.architecture import Architecture, Stack, keep_blocks
from aicompress.model.shapes import block_traits, build, misfits
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.calibration.stacks import Scoring
from aicompress.pipeline.plan import LayerPlan
from aicompress.pipeline.preflight import known_kinds
from aicompress.recipe import Recipe
from aicompress.weights import TensorSpec


@dataclass(frozen=True)
class Cut:
    """Some units of one axis stay.

    Attributes:
        structure: the structure whose units lie there, by its place in the edit.
        axis: of the parameter's tensor.
        spans: the axis holds one section after another, each with so many entries for every unit: (1, 1) for a fused
            gate and up projection, (head size,) for the heads of a query projection.
        begin: where the first section begins; what lies before and after the sections stays.
    """

    structure: int
    axis: int
    spans: tuple[int, ...] = (1,)
    begin: int = 0


@dataclass(frozen=True)
class Change:
    """One parameter of the output.

    Attributes:
        source: the parameter of the input that it is made of.
        cuts: what is cut away from it.
        detail, note: for the report; both are empty where nothing changes.
        refit: the method gives new values to what stays.
    """

    source: str
    cuts: tuple[Cut, ...] = ()
    detail: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    refit: bool = False


@dataclass(frozen=True)
class Edit:
    """A structural step before any tensor is read.

    Attributes:
        config: the output's config.json, or None for a bare file.
        structures: what the method chooses in.
        sizes: how many units of each stay.
        changes: every parameter of the output in the input's order.
        warnings: what the user should know.
        calibration: where samples came from that decided on the edit.
        kept: the units that stay, for structures where that is decided already.
        widths: layers whose shapes config.json does not give any more, by module; their tensors tell.
        files: side files of the output that are not as in the input.
    """

    config: dict[str, Any] | None
    structures: tuple[Structure, ...]
    sizes: tuple[int, ...]
    changes: Mapping[str, Change]
    warnings: tuple[str, ...] = field(default=())
    calibration: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    widths: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    files: Mapping[Path, bytes] = field(default_factory=dict)

    @property
    def changed(self) -> list[int]:
        """Structures of which some units go."""
        return [n for n, (s, size) in enumerate(zip(self.structures, self.sizes, strict=True)) if size < s.size]

    @property
    def consumers(self) -> list[str]:
        """Parameters that read the units of which some go."""
        changed = (self.structures[number] for number in self.changed)
        return list(dict.fromkeys(part.tensor for structure in changed for part in structure.of("consumer")))


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
            read = partial(_whole, checkpoint, name)
            yield Part(name, layer_name(name), "whole", block, read)


def _whole(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.dense(name).float().reshape(1, -1)


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


def with_refits(
    changes: Mapping[str, Change], structures: Sequence[Structure], sizes: Sequence[int], refits: bool
) -> dict[str, Change]:
    """The changes, with those marked whose values the method gives: consumers of what is cut, and their biases."""
    marked = dict(changes)
    for structure, size in zip(structures, sizes, strict=True):
        for part in structure.parts if refits and size < structure.size else ():
            if part.role in ("consumer", "offset"):
                change = marked[part.tensor]
                detail = change.detail or {"refit": "takes up the mean of what goes"}
                marked[part.tensor] = replace(change, refit=True, detail=detail)
    return marked


def offset_part(checkpoint: Checkpoint, consumer: str) -> Iterable[Part]:
    """The bias of a consumer, which can take up the mean of what goes."""
    module, _, leaf = consumer.rpartition(".")
    bias = f"{module}.bias"
    if leaf == "weight" and bias in checkpoint.parameters():
        yield Part(bias, f"{module}[0]", "offset", 0, partial(_whole, checkpoint, bias))


def require_loads(checkpoint: Checkpoint, edit: Edit, specs: Mapping[str, TensorSpec]) -> None:
    """Let transformers load the planned output without data: nothing may be missing or of another shape than planned.

    Raises:
        CheckpointError: something is, that was not in the input.
    """
    if edit.config is None or checkpoint.config is None:
        return
    earlier = misfits(checkpoint.config, checkpoint.parameters())
    known = {f"{path}.{leaf} has shape" for path in edit.widths for leaf in ("weight", "bias")}
    found = sorted(misfits(edit.config, specs) - earlier)
    found = [each for each in found if not any(each.startswith(name) for name in known)]
    if found:
        raise CheckpointError(
            f"the pruned checkpoint would not load: {found[0]}"
            + (f", and {len(found) - 1} more like it" if len(found) > 1 else ""),
            "this architecture cannot be pruned this way",
        )
