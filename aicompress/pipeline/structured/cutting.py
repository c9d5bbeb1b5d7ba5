"""Parameters of a structural output: cut from the input one after the other, or with new values for what stays."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint, CheckpointWriter
from aicompress.checkpoint.files import may_be_infinite
from aicompress.checkpoint.reader import require_finite
from aicompress.errors import CompressError
from aicompress.methods.structural import AnyPruner
from aicompress.pipeline.step import blocks
from aicompress.pipeline.step.blocks import copied_in_parts, put_block
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.output import Output
from aicompress.pipeline.structured.axes import Along, along, cut_matrix, length_of, positions, selected
from aicompress.pipeline.structured.edit import Edit
from aicompress.statistics import InputStats
from aicompress.weights import Weight

SHAPE = ".weight_shape"  # of compressed-tensors: two numbers, whatever the rows


@dataclass
class Cutting:
    """A structural run on its way.

    Attributes:
        checkpoint: the input.
        edit: what changes.
        output: every file and byte of the output.
        pruner: chooses the units that stay, and refits what reads them.
        writer: where bytes go.
        progress: told of every parameter.
        kept: the units that stay, by structure; chosen when they are first asked for.
        seconds: how long each parameter took that is written.
        warnings: what was noticed on the way.
        done: bytes of parameters that are written.
    """

    checkpoint: Checkpoint
    edit: Edit
    output: Output
    pruner: AnyPruner
    writer: CheckpointWriter
    progress: Progress
    kept: dict[int, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    done: int = 0

    def write(self, name: str, value: Tensor | None = None) -> None:
        """Write one parameter: a value that was made for it, or what the cuts leave of the input's."""
        start = time.perf_counter()
        if value is None and self._is_by_rows(name):
            self._write_by_rows(name)
        else:
            for disk, tensor in self.output.encode(name, self._cut(name) if value is None else value).items():
                self.writer.put(disk, tensor)
        self.seconds[name] = time.perf_counter() - start
        self.done += self.output.parameters[name].dense.nbytes
        self.say(name)

    def _is_by_rows(self, name: str) -> bool:
        """Whether what stays of a block of rows is a block of what stays."""
        planned, change = self.output.parameters[name], self.edit.changes[name]
        if planned.weight is None or not change.cuts:
            return bool(planned.dense.shape) and not any(one.stacked for one in change.cuts)
        axis, shape = self.checkpoint.row_axis(change.source), planned.dense.shape
        stored = {disk: spec.shape for disk, spec in self.output.stored[name].items() if not disk.endswith(SHAPE)}
        lengths = [lengths[0] if lengths else 1 for lengths in stored.values()]
        alone = all(length == 1 or length % shape[axis] == 0 for length in lengths)  # no rows share an entry
        return alone and len(shape) == 2 and bool(self.checkpoint.row_multiple(change.source))

    def _write_by_rows(self, name: str) -> None:
        """Read, cut and write a parameter block by block, in the form that was planned for it."""
        change, written, checkpoint = self.edit.changes[name], 0, self.checkpoint
        source, formed = change.source, self.output.parameters[name].weight is not None
        shape, lead = checkpoint.parameters()[source].shape, checkpoint.row_axis(source)
        if formed and not change.cuts and copied_in_parts(checkpoint, source, self.output, self.writer, name):
            return
        stays = {axis: self._axis(name, (axis, False), shape) for axis, _ in along(change.cuts)}
        for rows in checkpoint.row_blocks(source, blocks.BLOCK):
            own = slice(0, shape[lead]) if rows is None else rows
            left: Tensor | Weight | None = checkpoint.weight(source, rows) if formed else checkpoint.dense(source, rows)
            if isinstance(left, Tensor) and (stays or not may_be_infinite(source)):
                require_finite(left, source, checkpoint.path)
            count = own.stop - own.start
            for axis, index in stays.items():
                if axis == lead:
                    index = index[(index >= own.start) & (index < own.stop)] - own.start
                    count = len(index)
                if isinstance(left, Tensor):
                    left = left.index_select(axis, index)
                elif left is not None:
                    left = cut_matrix(left, bool(lead), shape, (axis, False), index)
            assert left is not None  # the plan made the same cuts in its outline
            if count:
                block = left, slice(written, written + count)
                put_block(self.output, self.writer, name, block, lead)
            written += count

    def say(self, what: str) -> None:
        """Report what is going on."""
        self.progress(what, self.done, self._total)

    @cached_property
    def _total(self) -> int:
        """Bytes of all parameters."""
        return sum(planned.dense.nbytes for planned in self.output.parameters.values())

    def resolve(
        self, number: int, inputs: Mapping[str, InputStats], importance: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Choose what stays of a structure by statistics, and write what gets new values.

        Args:
            number: the structure's place in the edit.
            inputs: statistics of its consumers' inputs by tensor.
            importance: of its units, (units,), where the method asks for it.

        Returns:
            Values that make the uncut model compute as the cut one does: its consumers, with zeros for what goes.
        """
        structure = self.edit.structures[number]
        known = structure.importance if importance is None else importance
        structure = replace(structure, inputs=inputs, importance=known)
        whole = {part.tensor: self._finite(part.tensor) for part in structure.parts if part.role != "producer"}
        kept = self.pruner.keep(structure, self.edit.sizes[number])
        self.kept[number] = torch.tensor(kept)
        refitted = self.pruner.refit(structure, kept)
        values: dict[str, Tensor] = {}
        for part in structure.of("consumer"):
            before = whole[part.tensor]
            (one,) = (c for c in self.edit.changes[part.tensor].cuts if c.structure == number)
            index = self._axis(part.tensor, (one.axis, one.stacked), before.shape)
            stays = before.index_select(one.axis, index)
            if part.tensor in refitted:
                stays = _laid(refitted[part.tensor], stays, one.axis)
                self.write(part.tensor, stays)
            values[part.tensor] = torch.zeros_like(before).index_copy_(one.axis, index, stays)
        for part in structure.of("offset"):
            if part.tensor in refitted:
                values[part.tensor] = _laid(refitted[part.tensor], whole[part.tensor], 0)
                self.write(part.tensor, values[part.tensor])
        return values

    def _finite(self, name: str) -> Tensor:
        tensor = self.checkpoint.dense(name)
        require_finite(tensor, name, self.checkpoint.path)
        return tensor

    def choose(self, number: int, inputs: Mapping[str, InputStats], importance: Tensor | None = None) -> None:
        """Choose what stays of a structure by statistics of its consumers' inputs by tensor, or by importance."""
        structure = replace(self.edit.structures[number], inputs=inputs, importance=importance)
        self.kept[number] = torch.tensor(self.pruner.keep(structure, self.edit.sizes[number]))

    def fit(self, number: int, inputs: Mapping[str, InputStats]) -> None:
        """Write some consumers of a structure whose units are chosen, refitted by statistics of their inputs."""
        whole, kept = self.edit.structures[number], self.kept[number].tolist()
        modules = {part.module for part in whole.of("consumer") if part.tensor in inputs}
        parts = tuple(p for p in whole.parts if p.role in ("consumer", "offset") and p.module in modules)
        refitted = self.pruner.refit(replace(whole, parts=parts, inputs=inputs), kept)
        consumers = {part.tensor for part in parts if part.role == "consumer"}
        for name, value in refitted.items():
            spec, cuts = self.checkpoint.parameters()[name], self.edit.changes[name].cuts
            own = next((one.axis for one in cuts if name in consumers and one.structure == number), None)
            shape = [len(kept) if axis == own else length for axis, length in enumerate(spec.shape)]
            tensor = _laid(value, torch.empty(shape, dtype=spec.dtype, device="meta"), own or 0)
            for axis in {one.axis for one in cuts} - {own}:
                tensor = tensor.index_select(axis, self._axis(name, (axis, False), spec.shape))
            self.write(name, tensor)

    def _units(self, number: int) -> Tensor:
        """The units of a structure that stay; those that nothing has chosen yet are chosen by their weights."""
        if number not in self.kept and number in self.edit.kept:
            self.kept[number] = torch.tensor(self.edit.kept[number])
        if number not in self.kept:
            self.kept[number] = torch.tensor(self.pruner.keep(self.edit.structures[number], self.edit.sizes[number]))
        return self.kept[number]

    def _axis(self, name: str, where: Along, shape: Sequence[int]) -> Tensor:
        """Positions that stay along an axis of a parameter's tensor."""
        cuts = [one for one in self.edit.changes[name].cuts if (one.axis, one.stacked) == where]
        kept = {one.structure: self._units(one.structure) for one in cuts}
        return positions(cuts, length_of(shape, where), self.edit.structures, kept)

    def _cut(self, name: str) -> Tensor | Weight:
        """What the cuts leave of a parameter, in the form that was planned for it."""
        checkpoint, change = self.checkpoint, self.edit.changes[name]
        planned = self.output.parameters[name]
        shape = checkpoint.parameters()[change.source].shape
        axes = along(change.cuts)
        if planned.weight is not None and planned.info is not None:
            weight: Weight | None = checkpoint.weight(change.source)
            for where in axes:
                assert weight is not None  # the plan made the same cuts in its outline
                weight = cut_matrix(weight, planned.info.transposed, shape, where, self._axis(name, where, shape))
            assert weight is not None
            return weight
        tensor = checkpoint.dense(change.source)
        if axes or not may_be_infinite(change.source):
            require_finite(tensor, change.source, checkpoint.path)
        for where in axes:
            tensor = selected(tensor, where, self._axis(name, where, shape))
        return tensor


def _laid(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    """Rows of units (units, numbers) as the tensor that they are read from, in its dtype."""
    moved = like.movedim(axis, 0)
    tensor = rows.reshape(moved.shape).movedim(0, axis).to(like.dtype).contiguous()
    if not torch.isfinite(tensor).all():
        raise CompressError(
            "a refit gave values that are not finite", "store the model in a wider dtype, or refit: false"
        )
    return tensor
