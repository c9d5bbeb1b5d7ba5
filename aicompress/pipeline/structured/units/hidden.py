"""Coordinates of the residual stream, and as large a share of every head whose size follows from the width."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.json_text import read_json
from aicompress.checkpoint.naming import layer_name
from aicompress.errors import CheckpointError, RecipeError
from aicompress.methods.prune.hidden import STREAM, Coordinates
from aicompress.methods.structural import Part, Structure
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.config_fields import dotted
from aicompress.model.architecture.feed_forward import Coupling
from aicompress.model.architecture.hidden_width import Residual, residual
from aicompress.model.architecture.layer_groups import grouped
from aicompress.model.loading.definitions.parameter_kinds import layer_kinds
from aicompress.pipeline.structured.calibrated_hidden import StreamChooser
from aicompress.pipeline.structured.edit import Cut, Edit, ParameterChange
from aicompress.pipeline.structured.parts import offset_part, part
from aicompress.pipeline.structured.unit import Kept, StructuralUnit, UnitLayout, require_axis


@dataclass(frozen=True)
class StreamLayout(UnitLayout):
    """The residual stream, and attentions whose heads' size is a share of its width, a structure for each.

    Attributes:
        checkpoint: the input, whose side files say the width too.
        stream: tensors that write the stream, read it or normalise it.
        attentions: projections of each such attention, by its name.
        exact: the width is given, not rounded.
    """

    checkpoint: Checkpoint
    stream: Residual
    attentions: Mapping[str, Sequence[Coupling]]
    exact: bool


class CoordinateUnit(StructuralUnit[Coordinates, StreamLayout]):
    """Coordinates of the residual stream."""

    kind = Coordinates
    silenceable = False  # norms divide by their number: the residual stream's own trial exchanges coordinates
    chooser = StreamChooser  # all blocks share the stream

    def find(self, checkpoint: Checkpoint, unit: Coordinates, stack: str | None) -> StreamLayout:
        """The residual stream, which all stacks share.

        Raises:
            Refused: config.json cannot express another width, or the checkpoint does not hold what its architecture
                has.
        """
        architecture = Architecture.of(checkpoint.config, checkpoint.parameters())
        if stack is not None:
            raise RecipeError("method.stack: all stacks share one hidden width", "leave method.stack out")
        stream = residual(architecture)
        for coupling in (*stream.couplings, *stream.inner):
            said = f"{dotted(stream.field)} of config.json is {stream.width}"
            require_axis(architecture.specs, coupling.tensor, coupling.axis, stream.width * coupling.parts, said)
        inner = grouped(stream.inner) if stream.inner else {}
        structures = [Structure(STREAM, stream.width, tuple(_stream_parts(checkpoint, stream)))]
        structures += [
            Structure(name, stream.width, tuple(_inner_parts(checkpoint, stream.width, group)), stream.heads)
            for name, group in inner.items()
        ]
        return StreamLayout(tuple(structures), architecture, checkpoint, stream, inner, unit.exact)

    def accepted(self, layout: StreamLayout, sizes: Sequence[int]) -> list[int]:
        """The width itself or, where it is rounded anyway, the next wider one that transformers takes.

        Raises:
            RecipeError: it takes none, or not this very one.
        """
        return [_accepted(layout.stream, sizes[0], layout.exact)] * len(sizes)

    def edit(self, layout: StreamLayout, sizes: Sequence[int], kept: Kept) -> Edit:
        """Cut every tensor that writes, reads or normalises the stream; config.json and side files have the width.

        Raises:
            CheckpointError: a layer beside the model reads the stream.
        """
        size, stream = sizes[0], layout.stream
        changes = {name: ParameterChange(name) for name in layout.architecture.specs}
        if size == stream.width:
            return Edit(dict(layout.architecture.config), layout.structures, tuple(sizes), changes)
        detail = {Coordinates.plural: f"{size} of {stream.width}"}
        for number, couplings in enumerate([stream.couplings, *layout.attentions.values()]):
            for coupling in couplings:
                earlier, cut = changes[coupling.tensor].cuts, Cut(number, coupling.axis, (1,) * coupling.parts)
                cuts = (cut, *earlier) if coupling.role == "consumer" and number == 0 else (*earlier, cut)
                changes[coupling.tensor] = ParameterChange(coupling.tensor, cuts, detail)
        files = side_files(layout.checkpoint, stream.width, size)
        return Edit(stream.narrowed(size), layout.structures, tuple(sizes), changes, files=files)


def _accepted(stream: Residual, size: int, exact: bool) -> int:
    reason = stream.refusal(size)
    if reason is None:
        return size
    wider = next((width for width in range(size, stream.width) if stream.refusal(width) is None), stream.width)
    if exact:
        fewer = next((width for width in range(size, 0, -1) if stream.refusal(width) is None), None)
        fits = " and ".join(str(width) for width in (fewer, wider) if width is not None)
        raise RecipeError(f"method.hidden_size: {size} does not fit: {reason}", f"the nearest that fit are {fits}")
    return wider


def _stream_parts(checkpoint: Checkpoint, stream: Residual) -> Iterable[Part]:
    """What each tensor gives to the coordinates; only layers can be watched, so only they are consumers."""
    assert checkpoint.config is not None
    kinds = layer_kinds(checkpoint.config, checkpoint.parameters()) or {}
    for coupling in stream.couplings:
        reads = coupling.role == "consumer" and kinds.get(coupling.tensor, "linear") in ("linear", "head")
        module = f"{layer_name(coupling.tensor)}[0]"
        take = partial(_slices, coupling, 0, stream.width)
        role: Literal["consumer", "producer"] = "consumer" if reads else "producer"
        yield part(checkpoint, coupling.tensor, module, role, take, (coupling.axis,))
        if reads:
            yield from offset_part(checkpoint, coupling.tensor)


def _inner_parts(checkpoint: Checkpoint, width: int, couplings: Sequence[Coupling]) -> Iterable[Part]:
    """Rows of the projections that make an attention's heads and columns of the one that reads them."""
    for coupling in couplings:
        for number in range(coupling.parts):
            take = partial(_slices, coupling, number * width, width)
            module = f"{layer_name(coupling.tensor)}[{number}]"
            yield part(checkpoint, coupling.tensor, module, "producer", take, (coupling.axis,))


def _slices(coupling: Coupling, first: int, width: int, value: Tensor) -> Tensor:
    return value.movedim(coupling.axis, 0)[first : first + width].reshape(width, -1)


def side_files(checkpoint: Checkpoint, width: int, size: int) -> dict[Path, bytes]:
    """Files of sentence-transformers that say how wide the model is.

    Raises:
        CheckpointError: a layer beside the model reads the stream.
    """
    files: dict[Path, bytes] = {}
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
            files[relative] = text.encode()
    return files


UNIT = CoordinateUnit()
