"""A structural step: tensors are cut, dropped and renamed together with config.json, one tensor in memory at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint, CheckpointWriter
from aicompress.checkpoint.place import require_apart, require_free, require_writable
from aicompress.checkpoint.reader import digests, require_finite
from aicompress.errors import CompressError, RecipeError, raise_all
from aicompress.layer import Kind, LayerInfo
from aicompress.methods import get
from aicompress.methods.registry import StructuralConfig, StructuralMethod
from aicompress.pipeline.edits import Change, Cut, Edit, drop_blocks, narrow, require_loads
from aicompress.pipeline.finish import Facts, finish
from aicompress.pipeline.layerwise import Options
from aicompress.pipeline.output import Destination, Output, Planned, arrange, lineage_step, summarize, with_digests
from aicompress.pipeline.plan import collect, known_kinds, left_out, require_space, stored_outline
from aicompress.pipeline.tied import open_input
from aicompress.recipe import Recipe, Select
from aicompress.report import gates
from aicompress.report.model import LayerRow, Report
from aicompress.report.plan import PlanRow, PlanSummary
from aicompress.weights import LowRank, TensorSpec, Weight, outline_nbytes
from aicompress.weights.cutting import cut


@dataclass(frozen=True)
class StructurePlan:
    """A structural step that can be run, or printed.

    Attributes:
        checkpoint: the input.
        recipe: what to do.
        method: how.
        infos: every layer of the input.
        edit: what changes.
        output: every file and byte of the output.
        kinds: what the model definition says of the parameters.
        warnings: what the user should know.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    method: StructuralMethod
    infos: tuple[LayerInfo, ...]
    edit: Edit
    output: Output
    kinds: Mapping[str, Kind | None] | None
    warnings: tuple[str, ...]

    def rows(self, seconds: Mapping[str, float] | None = None) -> tuple[LayerRow, ...]:
        """A row for each layer of the input, the dropped ones included."""
        made = {change.source: (name, change) for name, change in self.edit.changes.items()}
        took = seconds or {}
        return tuple(self._row(info, made.get(info.tensor), took.get(info.tensor, 0.0)) for info in self.infos)

    def _row(self, info: LayerInfo, made: tuple[str, Change] | None, seconds: float) -> LayerRow:
        method = self.method.name
        if made is None:
            return LayerRow(info.name, info.kind, "method", method, "dropped", {}, info.nbytes, 0, None, seconds)
        name, change = made
        size, form = self._stored(name, info)
        if not change.detail and not change.note:
            return LayerRow(info.name, info.kind, "-", "-", form, {}, info.nbytes, size, 0.0, seconds, "left as it is")
        detail = dict(change.detail)
        note = "its form cannot hold the cut: decoded" if self.decoded(name) else change.note
        error = None if change.cuts else 0.0
        return LayerRow(info.name, info.kind, "method", method, form, detail, info.nbytes, size, error, seconds, note)

    def decoded(self, name: str) -> bool:
        """Whether a compressed parameter of the input is a plain tensor of the output."""
        source = self.edit.changes[name].source
        return source in self.checkpoint.manifest.entries and self.output.parameters[name].weight is None

    def _stored(self, name: str, info: LayerInfo) -> tuple[int, str]:
        """Bytes and form of a layer of the input in the output; a decoded factor counts with the other one."""
        planned = self.output.parameters[name]
        weight = planned.weight
        if weight is None:
            return (0 if info.part == "in" else planned.dense.nbytes), "dense"
        if not self.edit.changes[name].cuts:
            return info.nbytes, info.stored
        if info.part and isinstance(weight, LowRank):
            weight = weight.out if info.part == "out" else weight.inner
            return outline_nbytes(weight), weight.form
        return sum(tensor.nbytes for tensor in self.output.encode(name, weight).values()), weight.form

    def summary(self) -> PlanSummary:
        """What a dry run prints."""
        stored = {info.name: info.stored for info in self.infos}
        rows = [row for row in self.rows() if row.method != "-"]
        shown = [
            PlanRow(r.name, r.kind, r.rule, stored[r.name], r.form, r.detail, r.bytes_before, r.bytes_after)
            for r in rows
        ]
        return summarize(self.output, self.checkpoint, shown, len(self.infos) - len(rows), self.warnings)


def make_plan(source: str | Path, destination: Destination, recipe: Recipe, command: str) -> StructurePlan:
    """Check everything and lay out the output.

    Reads headers only, unless whole blocks are chosen by their weights. transformers loads the planned output, without
    data, before any byte is written.

    Raises:
        Refused: or Problems, everything that is wrong.
    """
    method = get(command, recipe.method.name)
    if not isinstance(method, StructuralMethod) or not isinstance(recipe.method, StructuralConfig):
        raise TypeError(f"{method.name} is not structural")
    checkpoint, tied = open_input(source)
    problems: list[CompressError] = collect(lambda: require_free(destination.path, destination.overwrite))
    problems += collect(lambda: require_apart(checkpoint.source, destination.path))
    problems += collect(lambda: gates.parse_all(recipe.gates))
    raise_all(problems + _unused_sections(recipe))
    require_writable(destination.path)
    kinds, warnings = known_kinds(checkpoint)
    warnings = [*tied, *warnings]
    infos = tuple(checkpoint.layers(kinds))
    edit = (drop_blocks if method.units == "blocks" else narrow)(checkpoint, method, recipe.method)
    by_tensor = {info.tensor: info for info in infos}
    parameters = {name: _planned(checkpoint, edit, name, by_tensor) for name in edit.changes}
    require_loads(checkpoint, edit, {name: planned.dense for name, planned in parameters.items()})
    step = lineage_step(command, recipe, checkpoint.source)
    output = arrange(checkpoint, destination, parameters, step, edit.config)
    require_space(output)
    plan = StructurePlan(checkpoint, recipe, method, infos, edit, output, kinds, ())
    decoded = [name for name in parameters if plan.decoded(name)]
    told = [*warnings, *edit.warnings, *left_out(checkpoint)]
    if decoded:
        told.append(
            f"{len(decoded)} compressed parameters cannot be cut in the form they have and are decoded, "
            f"{decoded[0]} for one: prune first, then quantize or sparsify"
        )
    return replace(plan, warnings=tuple(told))


def _unused_sections(recipe: Recipe) -> list[CompressError]:
    """Sections that choose single layers mean nothing where layers change together."""
    given = [name for name in ("rules", "levels") if getattr(recipe, name)]
    if recipe.select != Select():
        given.append("select")
    return [
        RecipeError(f"{name}: has no meaning for {recipe.method.name}, which changes layers together", "remove it")
        for name in given
    ]


def _planned(checkpoint: Checkpoint, edit: Edit, name: str, infos: Mapping[str, LayerInfo]) -> Planned:
    """Outline of one parameter of the output."""
    change = edit.changes[name]
    old = checkpoint.parameters()[change.source]
    shape = list(old.shape)
    for one in change.cuts:
        shape[one.axis] = edit.sizes[one.structure] * one.parts
    spec = TensorSpec(old.dtype, tuple(shape))
    weight = stored_outline(checkpoint, change.source)
    info = infos.get(change.source)
    if weight is None or info is None:
        return Planned(spec, None, info)
    for one in change.cuts:
        index = torch.arange(edit.sizes[one.structure] * one.parts, device="meta")
        weight = None if weight is None else _cut_matrix(weight, info.transposed, old.shape, one, index)
    columns = math.prod(spec.shape[1:])
    matrix = (columns, spec.shape[0]) if info.transposed else (spec.shape[0], columns)
    return Planned(spec, weight, replace(info, tensor=name, shape=matrix, tensor_shape=spec.shape))


def _cut_matrix(weight: Weight, transposed: bool, shape: tuple[int, ...], one: Cut, index: Tensor) -> Weight | None:
    """Cut the matrix (out, in) of a compressed parameter along one axis of its tensor, whose shape was `shape`."""
    axis = 1 - one.axis if transposed else one.axis
    tail = math.prod(shape[2:])  # a kernel's elements lie beside one another in a row
    if axis > 1:
        return None
    if axis == 1 and tail > 1:
        index = (index[:, None] * tail + torch.arange(tail, device=index.device)).reshape(-1)
    return cut(weight, axis, index)


def run(plan: StructurePlan, options: Options | None = None) -> Report:
    """Write the output of a plan, its report inside. A stopped run starts anew: nothing here takes long.

    Raises:
        CheckpointError: a weight holds NaN or infinity; nothing is left behind.
        OutOfSpace: the disk is full; nothing is left behind.
    """
    options = options or Options()
    start = time.perf_counter()
    output, kept = plan.output, _Kept(plan)
    seconds: dict[str, float] = {}
    with CheckpointWriter(output.destination.path, output.shards) as writer, ThreadPoolExecutor(1) as pool:
        inputs = pool.submit(digests, plan.checkpoint.source)
        total, done = sum(p.dense.nbytes for p in output.parameters.values()), 0
        for name, planned in output.parameters.items():
            began = time.perf_counter()
            for disk, tensor in output.encode(name, _value(plan, name, kept)).items():
                writer.put(disk, tensor)
            seconds[plan.edit.changes[name].source] = time.perf_counter() - began
            done += planned.dense.nbytes
            options.progress(name, done, total)
        final = with_digests(output, inputs.result())
        facts = Facts(plan.recipe, plan.checkpoint, plan.kinds, plan.rows(seconds), plan.warnings, start)
        return finish(facts, final, writer, options.latency)


class _Kept:
    """The units that stay in each structure, chosen when the first of its tensors is cut."""

    def __init__(self, plan: StructurePlan) -> None:
        self._plan = plan
        self._chosen: dict[int, Tensor] = {}

    def index(self, one: Cut) -> Tensor:
        """Positions that stay along a tensor's axis; a fused axis repeats the units."""
        edit = self._plan.edit
        structure = edit.structures[one.structure]
        if one.structure not in self._chosen:
            units = self._plan.method.keep(structure, edit.sizes[one.structure], self._plan.recipe.method)
            self._chosen[one.structure] = torch.tensor(units)
        return torch.cat([self._chosen[one.structure] + part * structure.size for part in range(one.parts)])


def _value(plan: StructurePlan, name: str, kept: _Kept) -> Tensor | Weight:
    """One parameter of the output, in the form that was planned for it."""
    checkpoint, change = plan.checkpoint, plan.edit.changes[name]
    planned = plan.output.parameters[name]
    if planned.weight is not None and planned.info is not None:
        weight: Weight | None = checkpoint.weight(change.source)
        shape, transposed = checkpoint.parameters()[change.source].shape, planned.info.transposed
        for one in change.cuts:
            assert weight is not None  # the plan made the same cuts in its outline
            weight = _cut_matrix(weight, transposed, shape, one, kept.index(one))
        assert weight is not None
        return weight
    tensor = checkpoint.dense(change.source)
    require_finite(tensor, change.source, checkpoint.path)
    for one in change.cuts:
        tensor = tensor.index_select(one.axis, kept.index(one))
    return tensor
