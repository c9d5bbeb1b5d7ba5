"""The report of a packing: bytes of both sides by kind, a row for every layer, what was seen in the numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.header import DTYPES
from aicompress.checkpoint.naming import kinds_among
from aicompress.checkpoint.packed.raw_header import Extent, RawHeader
from aicompress.checkpoint.packed.writer import FileWriter
from aicompress.errors import CompressError
from aicompress.lossless.chunks import Layout
from aicompress.lossless.difference import Difference
from aicompress.pipeline.packing.coding import CodedTensor
from aicompress.pipeline.packing.plan import PackingPlan
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import lineage_step
from aicompress.pipeline.step.report import Results, add_report, build_report
from aicompress.pipeline.step.sides import side_of
from aicompress.report.model import LayerRow, Report, Side
from aicompress.report.plan import PlanRow
from aicompress.weights import TensorSpec

NARROWER = {Layout.UPPER: "bfloat16", Layout.HALF: "float16"}


@dataclass(frozen=True)
class Tensors:
    """The tensors of several files, each under a file's name and its own.

    Attributes:
        headers: of the unpacked files, by name.
        stored: bytes of each tensor in the packed files, by file.
    """

    headers: Mapping[str, RawHeader]
    stored: Mapping[str, Mapping[str, int]]

    def each(self) -> Iterable[tuple[str, str, Extent, str]]:
        """File, name, extent and kind of every tensor."""
        for file, header in self.headers.items():
            for name, extent in header.extents.items():
                yield file, name, extent, self.kinds[file].get(name) or "other"

    @cached_property
    def kinds(self) -> dict[str, dict[str, str | None]]:
        """The kind of layer of every tensor, by name and shape; None for what is no layer."""
        return {file: dict(_kinds(header.extents)) for file, header in self.headers.items()}

    def by_kind(self, weight_bytes: int, packed: bool) -> dict[str, int]:
        """Bytes of one side's weight files by kind."""
        sums: dict[str, int] = {}
        for file, name, extent, kind in self.each():
            sums[kind] = sums.get(kind, 0) + (self.stored[file].get(name, 0) if packed else extent.nbytes)
        return {**sums, "header": weight_bytes - sum(sums.values())}

    @property
    def numbers(self) -> int:
        """How many elements all tensors have."""
        return sum(math.prod(extent.shape) for header in self.headers.values() for extent in header.extents.values())


def _kinds(extents: Mapping[str, Extent]) -> Mapping[str, str | None]:
    known = {
        name: TensorSpec(DTYPES[extent.dtype], extent.shape)
        for name, extent in extents.items()
        if extent.dtype in DTYPES
    }
    return kinds_among(None, known)


def rows_of(tensors: Tensors, coded: Mapping[str, Mapping[str, CodedTensor]]) -> list[LayerRow]:
    """A row for every layer: what its numbers were stored as."""
    return [
        LayerRow(
            name.removesuffix(".weight"), kind, "pack", "pack", "packed", _detail(coded[file][name]),
            extent.nbytes, coded[file][name].nbytes, 0.0, 0.0,
        )
        for file, name, extent, kind in tensors.each()
        if kind != "other"
    ]  # fmt: skip


def plan_rows(rows: Iterable[LayerRow]) -> tuple[PlanRow, ...]:
    """The same for a plan."""
    return tuple(
        PlanRow(r.name, r.kind, r.rule, "plain", r.form, r.detail, r.bytes_before, r.bytes_after) for r in rows
    )


def _detail(coded: CodedTensor) -> dict[str, str]:
    """What a tensor's chunks were stored as."""
    if not coded.nbytes:
        return {"same": "as the base"}
    narrower = [words for layout, words in NARROWER.items() if layout in coded.layouts]
    detail = {"exactly": ", ".join(narrower)} if narrower else {}
    if coded.difference is not Difference.NONE:
        detail["difference"] = coded.difference.name.lower()
    return detail


def notes_of(coded: Mapping[str, Mapping[str, CodedTensor]], headers: Mapping[str, RawHeader]) -> tuple[str, ...]:
    """What was seen in the numbers, in words."""
    tensors = [(headers[file].extents[name], each) for file, named in coded.items() for name, each in named.items()]
    notes = []
    for layout, words in NARROWER.items():
        count = sum(each.layouts == {layout} for _, each in tensors)
        if count:
            notes.append(f"float32 numbers that are exactly {words} numbers are stored as these: {count} tensors")
    same = sum(not each.nbytes for extent, each in tensors if extent.nbytes)
    if same:
        notes.append(f"equal to the base's, and not stored: {same} tensors")
    for kind in Difference:
        count = sum(each.difference is kind and bool(each.nbytes) for _, each in tensors)
        if kind is not Difference.NONE and count:
            notes.append(f"stored as the difference to the base ({kind.name.lower()}): {count} tensors")
    return tuple(notes)


def written(
    plan: PackingPlan, writer: FileWriter, tensors: Tensors, digests: tuple[Mapping[str, str], Mapping[str, str]],
    base: Mapping[str, str], rows: Sequence[LayerRow], timing: tuple[float, Options],
) -> Report:  # fmt: skip
    """Add the report to an output that is complete but for it.

    Args:
        plan: what was run.
        writer: of the output.
        tensors: of all files.
        digests: sha256 of the weight files of the input and of the output, by name.
        base: sha256 of the files of the base that were read.
        rows: what was done.
        timing: seconds of the work, and the options of the run.
    """
    (seconds, options), command = timing, plan.recipe.method.name
    packs = command == "pack"
    stored, weights = numbers_of(plan.source.path, tensors) if packs else (tensors.numbers, tensors.numbers)

    def side(path: Path, nbytes: int, packed: bool, sha256: Mapping[str, str]) -> Side:
        kinds = tensors.by_kind(nbytes, packed)
        return Side(str(path), nbytes + plan.side_bytes, nbytes, stored, kinds, dict(sha256), weights=weights)

    before = side(plan.source.path, sum(file.stat().st_size for file in plan.source.files), not packs, digests[0])
    after = side(plan.destination.path, sum(plan.nbytes.values()), packs, digests[1])
    further = {} if plan.base is None else {"base": plan.base.source}
    step = lineage_step(command, plan.recipe, plan.source, further)
    step["inputs"] = dict(digests[0])
    if plan.base is not None:
        step["base"] = {"inputs": dict(base)}
    results = Results(tuple(rows), plan.warnings, notes=plan.notes, waited=options.waited())
    lineage = (*_lineage(plan.source.path), step)
    report = build_report(command, plan.recipe, (before, after), lineage, results, seconds)
    return add_report(report, plan.recipe.report.html, writer, "" if plan.destination.single else f"{command}.")


def _lineage(path: Path) -> tuple[dict[str, object], ...]:
    """The steps that made a checkpoint, as far as it can be opened."""
    try:
        return Checkpoint.open(path).manifest.lineage
    except CompressError:
        return ()


def numbers_of(path: Path, tensors: Tensors) -> tuple[int, int]:
    """How many numbers a checkpoint stores, and how many the weights have that it stands for."""
    try:
        opened = side_of(Checkpoint.open(path), None, str(path))
    except CompressError:  # several checkpoints, or dtypes that torch does not have
        return tensors.numbers, tensors.numbers
    return opened.parameters, opened.weights or tensors.numbers
