"""What narrowing the hidden width changes: the residual stream everywhere, and heads whose size is a share of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.naming import layer_name
from aicompress.checkpoint.source import read_json
from aicompress.errors import CheckpointError, RecipeError
from aicompress.methods.prune.hidden import STREAM
from aicompress.methods.structural import Part, StructuralConfig, StructuralMethod, Structure
from aicompress.model.architecture.architecture import Architecture, Coupling
from aicompress.model.architecture.hidden_width import Residual, residual
from aicompress.model.architecture.layer_groups import grouped
from aicompress.model.loading.definition import layer_kinds
from aicompress.pipeline.calibration.requirements import Request
from aicompress.pipeline.structured.edit import Change, Cut, Edit, offset_part, with_refits
from aicompress.recipe import Recipe


def narrow_hidden(checkpoint: Checkpoint, method: StructuralMethod, recipe: Recipe, request: Request) -> Edit:
    """Keep some coordinates of the residual stream, and as large a share of every head whose size follows from it.

    Raises:
        Refused: config.json cannot express it, transformers does not take the width, or the checkpoint does not hold
            what its architecture has.
    """
    config = recipe.method
    assert isinstance(config, StructuralConfig)
    architecture = Architecture.of(checkpoint.config, checkpoint.parameters())
    if config.stack is not None:
        raise RecipeError("method.stack: all stacks share one hidden width", "leave method.stack out")
    found = residual(architecture)
    _require_tensors(checkpoint, found)
    inner = grouped(found.inner) if found.inner else {}
    structures = [Structure(STREAM, found.width, tuple(_stream_parts(checkpoint, found)))]
    structures += [
        Structure(name, found.width, tuple(_inner_parts(checkpoint, found.width, group)), found.heads)
        for name, group in inner.items()
    ]
    size = _accepted(found, method.sizes(structures, config)[0], getattr(config, "hidden_size", None) is not None)
    changes = {name: Change(name) for name in architecture.specs}
    if size < found.width:
        for number, couplings in enumerate([found.couplings, *inner.values()]):
            for coupling in couplings:
                earlier, cut = changes[coupling.tensor].cuts, Cut(number, coupling.axis, (1,) * coupling.parts)
                cuts = (cut, *earlier) if coupling.role == "consumer" and number == 0 else (*earlier, cut)
                changes[coupling.tensor] = Change(coupling.tensor, cuts, {"hidden": f"{size} of {found.width}"})
    edited = found.narrowed(size) if size < found.width else dict(architecture.config)
    refitted = with_refits(changes, structures[:1], (size,), method.refits(config))
    files = _side_files(checkpoint, found.width, size) if size < found.width else {}
    return Edit(edited, tuple(structures), (size,) * len(structures), refitted, files=files)


def _accepted(found: Residual, size: int, exact: bool) -> int:
    """The width itself or, where it is rounded anyway, the next wider one that transformers takes.

    Raises:
        RecipeError: it takes none, or not this very one.
    """
    reason = found.refusal(size)
    if reason is None:
        return size
    wider = next((width for width in range(size, found.width) if found.refusal(width) is None), found.width)
    if exact:
        fewer = next((width for width in range(size, 0, -1) if found.refusal(width) is None), None)
        fits = " and ".join(str(width) for width in (fewer, wider) if width is not None)
        raise RecipeError(f"method.hidden_size: {size} does not fit: {reason}", f"the nearest that fit are {fits}")
    return wider


def _require_tensors(checkpoint: Checkpoint, found: Residual) -> None:
    """The checkpoint must hold what its architecture has.

    Raises:
        CheckpointError: a tensor is missing, or of another width.
    """
    specs = checkpoint.parameters()
    for coupling in (*found.couplings, *found.inner):
        spec, length = specs.get(coupling.tensor), found.width * coupling.parts
        if spec is None or len(spec.shape) <= coupling.axis or spec.shape[coupling.axis] != length:
            raise CheckpointError(
                f"{coupling.tensor} is {'missing' if spec is None else spec.shape}, but {'.'.join(found.field)} of "
                f"config.json is {found.width}",
                "the checkpoint and its config.json do not belong together",
            )


def _stream_parts(checkpoint: Checkpoint, found: Residual) -> Iterable[Part]:
    """What each tensor gives to the coordinates; only layers can be watched, so only they are consumers."""
    assert checkpoint.config is not None
    kinds = layer_kinds(checkpoint.config, checkpoint.parameters()) or {}
    for coupling in found.couplings:
        reads = coupling.role == "consumer" and kinds.get(coupling.tensor, "linear") in ("linear", "head")
        module = f"{layer_name(coupling.tensor)}[0]"
        take = partial(_slices, coupling, 0, found.width)
        read = partial(_read, checkpoint, coupling.tensor, take)
        yield Part(coupling.tensor, module, "consumer" if reads else "producer", 0, read, take=take)
        if reads:
            yield from offset_part(checkpoint, coupling.tensor)


def _inner_parts(checkpoint: Checkpoint, width: int, couplings: Sequence[Coupling]) -> Iterable[Part]:
    """Rows of the projections that make an attention's heads and columns of the one that reads them."""
    for coupling in couplings:
        for part in range(coupling.parts):
            read = partial(_read, checkpoint, coupling.tensor, partial(_slices, coupling, part * width, width))
            yield Part(coupling.tensor, f"{layer_name(coupling.tensor)}[{part}]", "producer", 0, read)


def _read(checkpoint: Checkpoint, tensor: str, take: Callable[[Tensor], Tensor]) -> Tensor:
    return take(checkpoint.dense(tensor))


def _slices(coupling: Coupling, first: int, width: int, value: Tensor) -> Tensor:
    return value.movedim(coupling.axis, 0)[first : first + width].float().reshape(width, -1)


def _side_files(checkpoint: Checkpoint, width: int, size: int) -> dict[Path, bytes]:
    """Files of sentence-transformers that say how wide the model is.

    Raises:
        CheckpointError: a layer beside the model reads the stream.
    """
    found: dict[Path, bytes] = {}
    folder = checkpoint.source.folder
    for relative in checkpoint.source.side_files if folder is not None else ():
        if relative.name != "config.json" or len(relative.parts) < 2:
            continue
        plain: dict[str, Any] = read_json(folder / relative)  # type: ignore[operator]
        if plain.get("in_features") == width:
            raise CheckpointError(
                f"{relative.parent} is a layer of its own that reads the hidden width", "remove it from modules.json"
            )
        if plain.get("word_embedding_dimension") == width:
            text = json.dumps({**plain, "word_embedding_dimension": size}, indent=2, ensure_ascii=False) + "\n"
            found[relative] = text.encode()
    return found
