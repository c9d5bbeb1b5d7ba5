"""Plan and run `pack`: every weight file losslessly coded, every other file copied."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from aicompress.checkpoint.header import packed_error
from aicompress.checkpoint.packed.folder import everything
from aicompress.checkpoint.packed.raw_header import read_raw_header
from aicompress.checkpoint.packed.reader import is_packed
from aicompress.checkpoint.packed.writer import FileWriter
from aicompress.checkpoint.place import shared_mode
from aicompress.pipeline.packing.coding import PackedResult, counted, pack_file
from aicompress.pipeline.packing.plan import Base, PackingPlan, packed_name, require_place
from aicompress.pipeline.packing.results import Tensors, notes_of, plan_rows, rows_of, written
from aicompress.pipeline.step.checks import files_left_out, require_room
from aicompress.pipeline.step.digests import hashing
from aicompress.pipeline.step.options import Options, Progress
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.made import Direction, PackingRecipe
from aicompress.report.model import LayerRow, Report


def make_plan(source: str | Path, destination: Destination, base: str | Path | None = None) -> PackingPlan:
    """Check everything that headers tell.

    Raises:
        Refused: or Problems, everything that is wrong.
    """
    files = everything(source)
    opened = None if base is None else Base.open(base)
    packed = [file for file in files.files if is_packed(file)]
    if packed:
        raise packed_error(packed[0])
    require_place(files, opened, destination)
    names = {file: packed_name(files.name_of(file)) for file in files.files}
    if destination.single:
        names = dict.fromkeys(files.files, destination.path.name)
    recipe = PackingRecipe(method=Direction(name="pack"))
    plan = PackingPlan(files, destination, recipe, opened, names, {}, warnings=tuple(files_left_out(files)))
    require_room(destination.path, plan.side_bytes)
    return plan


def _code(plan: PackingPlan, writer: FileWriter | None, progress: Progress) -> dict[str, PackedResult]:
    """Pack every file, by its name; without a writer the bytes are only counted."""
    files = {plan.source.name_of(file): (file, read_raw_header(file)) for file in plan.source.files}
    done = counted(progress, [header for _, header in files.values()])
    return {
        name: pack_file(file, header, name, plan.base, (writer, plan.names[file]), done)
        for name, (file, header) in files.items()
    }


def _told(plan: PackingPlan, results: Mapping[str, PackedResult]) -> tuple[PackingPlan, Tensors, list[LayerRow]]:
    """The plan with what packing its files has shown, their tensors, and a row for every layer."""
    headers = {name: result.header for name, result in results.items()}
    coded = {name: result.tensors for name, result in results.items()}
    stored = {name: {key: each.nbytes for key, each in tensors.items()} for name, tensors in coded.items()}
    tensors = Tensors(headers, stored)
    rows = rows_of(tensors, coded)
    known = replace(
        plan,
        nbytes={plan.names[file]: results[plan.source.name_of(file)].nbytes for file in plan.source.files},
        rows=plan_rows(rows),
        unchanged=sum(len(header.extents) for header in headers.values()) - len(rows),
        notes=notes_of(coded, headers),
    )
    return known, tensors, rows


def measured(plan: PackingPlan, progress: Progress) -> PackingPlan:
    """The plan with the exact bytes of every file, which coding all of it tells; nothing is written."""
    return _told(plan, _code(plan, None, progress))[0]


def run(plan: PackingPlan, options: Options) -> Report:
    """Write the packed output, its report inside.

    Raises:
        CheckpointError: an input cannot be read; nothing is left behind.
        OutOfSpace: the disk is full; nothing is left behind.
    """
    begun, destination = time.perf_counter(), plan.destination
    inputs = [plan.source, *([] if plan.base is None else [plan.base.source])]
    hashed: AbstractContextManager[list[Future[dict[str, str]]]] = (
        nullcontext([]) if plan.base is None else hashing([plan.base.source])
    )
    mode = shared_mode(file for each in inputs for file in each.files)
    with FileWriter(destination.path, destination.overwrite, mode) as writer, hashed as futures:
        results = _code(plan, writer, options.progress)
        base = futures[0].result() if futures else {}
        for result in results.values():
            result.file.finish(result.sha256, {file: base[file] for file in sorted(result.base)})
        for relative in plan.source.side_files:
            if plan.source.folder is not None:
                writer.add(relative, plan.source.folder / relative)
        digests = {name: result.sha256 for name, result in results.items()}, writer.digests()
        known, tensors, rows = _told(plan, results)
        report = written(known, writer, tensors, digests, base, rows, (time.perf_counter() - begun, options))
        writer.seal()
    return report
