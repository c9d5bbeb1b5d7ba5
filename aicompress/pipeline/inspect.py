"""What a checkpoint holds: a row per parameter, totals by kind, its history, and the distribution of its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.files import read_headers
from aicompress.checkpoint.manifest import Manifest
from aicompress.checkpoint.naming import kinds_among, layer_name
from aicompress.checkpoint.source import locate
from aicompress.errors import Unsupported
from aicompress.layer import LayerInfo
from aicompress.pipeline.analysis import PIECE, Analysis, Distribution, RoundingLoss, distribution, rounding
from aicompress.pipeline.step.checks import known_kinds
from aicompress.pipeline.step.models.shared_inputs import SharedInputs
from aicompress.pipeline.step.sides import side_of, stored_numbers
from aicompress.report.model import Side
from aicompress.weights import Dense


@dataclass(frozen=True)
class ParameterRow:
    """One parameter.

    Attributes:
        name: its name; without the final `.weight` for a layer.
        kind: linear, conv, embedding, head, or other.
        form: how it is stored.
        detail: bits, group, rank or sparsity, as the form describes itself.
        shape: of the dense parameter.
        dtype: of the dense parameter.
        numbers: how many it stores: elements, codes, kept values, or those of its factors.
        nbytes: on disk, scales included.
        distribution: when it was asked for.
    """

    name: str
    kind: str
    form: str
    detail: str
    shape: tuple[int, ...]
    dtype: str
    numbers: int
    nbytes: int
    distribution: Distribution | None = None
    rounding: RoundingLoss | None = None

    @property
    def bits(self) -> float:
        """Bits on disk per element of the dense parameter."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))


@dataclass(frozen=True)
class Total:
    """All parameters of one kind."""

    kind: str
    count: int
    numbers: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """A checkpoint as `inspect` shows it.

    Attributes:
        side: bytes and parameters of the whole.
        layout: plain, native or compressed-tensors.
        architecture: as config.json names it, or "".
        rows: a row per parameter, in file order.
        totals: by kind, largest first.
        lineage: every step that made it, oldest first.
        warnings: what the user should know.
    """

    side: Side
    layout: str
    architecture: str
    rows: tuple[ParameterRow, ...]
    totals: tuple[Total, ...]
    lineage: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]


def inspect(source: str | Path, analysis: Analysis | None = None) -> Inspection:
    """Read what a checkpoint holds: headers only, unless its weights are to be analyzed, a block of rows at a time.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        checkpoint, unread = Checkpoint.open(source), []
    except Unsupported as error:
        checkpoint, unread = _as_stored(source), [f"{error.message}: tensors are listed as they are stored"]
    kinds, warnings = known_kinds(checkpoint)
    warnings = [*unread, *warnings]
    rows: dict[str, ParameterRow] = {}
    parameters = checkpoint.parameters()
    whole = [info for info in checkpoint.layers(kinds) if not info.part] if analysis else []
    layers = {info.tensor: info for info in whole}
    layer_kinds = kinds_among(kinds, parameters)
    for name, spec in parameters.items():
        kind = layer_kinds[name]
        rows[name] = ParameterRow(
            layer_name(name) if kind else name, kind or "other", *_form(checkpoint, name), spec.shape,
            str(spec.dtype).removeprefix("torch."), stored_numbers(checkpoint, name), checkpoint.nbytes(name),
        )  # fmt: skip
        if analysis and spec.dtype.is_floating_point:
            rows[name] = _analyzed(checkpoint, name, rows[name], layers.get(name), analysis)
    if analysis:
        rows = agreed(rows, SharedInputs(checkpoint, tuple(layers)))
    config = checkpoint.config or {}
    architecture = str((config.get("architectures") or [config.get("model_type", "")])[0])
    side = side_of(checkpoint, kinds, str(source))
    parameter_rows, lineage = tuple(rows.values()), checkpoint.manifest.lineage
    return Inspection(
        side, checkpoint.layout, architecture, parameter_rows, _totals(parameter_rows), lineage, tuple(warnings)
    )


def _form(checkpoint: Checkpoint, name: str) -> tuple[str, str]:
    """How a parameter is stored, and the settings of that; of another tool's layout its own name."""
    foreign = checkpoint.foreign.weights.get(name)
    if foreign is not None and foreign.words:
        form, _, settings = foreign.words.partition(", ")
        return form, settings
    outline = checkpoint.stored_outline(name)
    if outline is None:
        return Dense.form, ""
    lent = [f"{part or 'all'} of {layer_name(owner)}" for part, owner in checkpoint.manifest.owners(name).items()]
    return outline.form, ", ".join(filter(None, (outline.describe(), *lent)))


def _analyzed(
    checkpoint: Checkpoint, name: str, row: ParameterRow, layer: LayerInfo | None, analysis: Analysis
) -> ParameterRow:
    """A row with the distribution of its numbers and, for a layer, what rounding does to it; reads blocks of rows."""
    axis = int(layer.transposed) if layer is not None else checkpoint.row_axis(name)

    def read(rows: slice | None) -> Tensor:
        if rows is None or not checkpoint.is_plain(name):
            return checkpoint.dense(name, rows)
        return checkpoint.rows(name, rows.start, rows.stop, axis)

    blocks = [partial(read, rows) for rows in checkpoint.row_blocks(name, PIECE, axis)]
    row = replace(row, distribution=distribution(blocks, axis))
    if layer is None or row.distribution is None:
        return row
    matrices = [lambda block=block: layer.matrix(block()).float() for block in blocks]
    return replace(row, rounding=rounding(matrices, layer.shape[1], row.distribution, analysis))


def _as_stored(source: str | Path) -> Checkpoint:
    """A checkpoint whose weights this version does not decode: every tensor stands for itself."""
    located = locate(source)
    tensors, metadata = read_headers(located)
    return Checkpoint(located, tensors, Manifest(), "plain", metadata)


def agreed(rows: dict[str, ParameterRow], sharing: SharedInputs) -> dict[str, ParameterRow]:
    """Rows whose proposals are the same for layers that share their input: the widest of theirs."""
    units: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row.rounding is not None:
            units.setdefault(sharing.leaders.get(name, name), []).append(name)
    agreed_rows = dict(rows)
    for names in units.values():
        theirs = {name: rounding for name in names if (rounding := rows[name].rounding) is not None}
        wanted = [each.proposed for each in theirs.values()]
        widest = None if None in wanted else max(bits for bits in wanted if bits is not None)
        agreed_rows |= {
            name: replace(rows[name], rounding=replace(each, proposed=widest)) for name, each in theirs.items()
        }
    return agreed_rows


def _totals(rows: Sequence[ParameterRow]) -> tuple[Total, ...]:
    totals = []
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        totals.append(
            Total(kind, len(of_kind), sum(row.numbers for row in of_kind), sum(row.nbytes for row in of_kind))
        )
    return tuple(sorted(totals, key=lambda total: -total.nbytes))
