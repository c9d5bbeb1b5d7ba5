"""What narrowing the hidden width changes: one structure, the coordinates of the residual stream, in every tensor."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.naming import layer_name
from aicompress.errors import CheckpointError, RecipeError
from aicompress.methods.registry import Part, StructuralConfig, StructuralMethod, Structure
from aicompress.model.architecture import Architecture
from aicompress.model.kinds import layer_kinds
from aicompress.model.residual import Residual, residual
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.edits import Change, Cut, Edit, offset_part, with_refits
from aicompress.recipe import Recipe


def narrow_hidden(checkpoint: Checkpoint, method: StructuralMethod, recipe: Recipe, request: Request) -> Edit:
    """Keep some coordinates of the residual stream.

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
    stream = Structure("hidden", found.width, tuple(_parts(checkpoint, found)))
    (size,) = method.sizes([stream], config)
    size = _accepted(found, size, exact=getattr(config, "hidden_size", None) is not None)
    changes = {name: Change(name) for name in architecture.specs}
    for coupling in found.couplings if size < found.width else ():
        cut = Cut(0, coupling.axis)
        changes[coupling.tensor] = Change(coupling.tensor, (cut,), {"hidden": f"{size} of {found.width}"})
    edited = found.narrowed(size) if size < found.width else dict(architecture.config)
    return Edit(edited, (stream,), (size,), with_refits(changes, (stream,), (size,), method.refits(config)))


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


def _parts(checkpoint: Checkpoint, found: Residual) -> Iterable[Part]:
    """What each tensor gives to the coordinates; only layers can be watched, so only they are consumers.

    Raises:
        CheckpointError: the checkpoint does not hold what its architecture has.
    """
    specs = checkpoint.parameters()
    assert checkpoint.config is not None
    kinds = layer_kinds(checkpoint.config, specs) or {}
    for coupling in found.couplings:
        spec = specs.get(coupling.tensor)
        if spec is None or len(spec.shape) <= coupling.axis or spec.shape[coupling.axis] != found.width:
            raise CheckpointError(
                f"{coupling.tensor} is {'missing' if spec is None else spec.shape}, but {'.'.join(found.field)} of "
                f"config.json is {found.width}",
                "the checkpoint and its config.json do not belong together",
            )
        reads = coupling.role == "consumer" and kinds.get(coupling.tensor, "linear") in ("linear", "head")
        module = f"{layer_name(coupling.tensor)}[0]"
        read = partial(_slices, checkpoint, coupling.tensor, coupling.axis)
        yield Part(coupling.tensor, module, "consumer" if reads else "producer", 0, read)
        if reads:
            yield from offset_part(checkpoint, coupling.tensor)


def _slices(checkpoint: Checkpoint, tensor: str, axis: int) -> Tensor:
    value = checkpoint.dense(tensor).movedim(axis, 0)
    return value.float().reshape(len(value), -1)
