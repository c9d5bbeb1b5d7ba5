"""Plan and run `pack`: every weight file losslessly coded, every other file copied."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from aicompress.checkpoint.header import packed_error
from aicompress.checkpoint.packed.folder import everything
from aicompress.checkpoint.packed.raw_header import RawHeader, read_raw_header
from aicompress.checkpoint.packed.reader import is_packed
from aicompress.checkpoint.packed.writer import FileWriter, PackedFile
from aicompress.checkpoint.place import shared_mode
from aicompress.pipeline.packing.coding import PackedResult, counted, pack_file
from aicompress.pipeline.packing.plan import Base, PackingPlan, left_out, packed_name, require_place
from aicompress.pipeline.packing.results import Tensors, notes_of, plan_rows, rows_of, written
from aicompress.pipeline.step.checks import require_room
from aicompress.pipeline.step.digests import hashing
from aicompress.pipeline.step.options import Options, Progress
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.made import Direction, PackingRecipe
from aicompress.report.model import Report


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
    plan = PackingPlan(files, destination, recipe, opened, names, {}, warnings=tuple(left_out(files)))
    require_room(destination.path, plan.side_bytes)
    return plan


@dataclass(frozen=True)
class _Coded:
    """What packing the files of a plan gave: by name of the input's files."""

    headers: Mapping[str, RawHeader]
    results: Mapping[str, PackedResult]
    files: Mapping[str, PackedFile]

    @property
    def tensors(self) -> Tensors:
        stored = {name: {key: each.nbytes for key, each in r.tensors.items()} for name, r in self.results.items()}
        return Tensors(self.headers, stored)

    def plan_of(self, plan: PackingPlan) -> PackingPlan:
        """The plan with what is known now."""
        coded = {name: result.tensors for name, result in self.results.items()}
        rows = plan_rows(rows_of(self.tensors, coded))
        return replace(
            plan,
            nbytes={plan.names[file]: self.results[plan.source.name_of(file)].nbytes for file in plan.source.files},
            rows=rows,
            unchanged=sum(len(header.extents) for header in self.headers.values()) - len(rows),
            notes=notes_of(coded, self.headers),
        )


def _code(plan: PackingPlan, writer: FileWriter | None, progress: Progress) -> _Coded:
    """Pack every file; without a writer the bytes are only counted."""
    headers = {plan.source.name_of(file): read_raw_header(file) for file in plan.source.files}
    done = counted(progress, headers.values())
    results, files = {}, {}
    for file in plan.source.files:
        name = plan.source.name_of(file)
        files[name], results[name] = pack_file(file, headers[name], name, plan.base, (writer, plan.names[file]), done)
    return _Coded(headers, results, files)


def measured(plan: PackingPlan, progress: Progress) -> PackingPlan:
    """The plan with the exact bytes of every file, which coding all of it tells; nothing is written."""
    return _code(plan, None, progress).plan_of(plan)


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
        coded = _code(plan, writer, options.progress)
        base = futures[0].result() if futures else {}
        for name, packed in coded.files.items():
            result = coded.results[name]
            packed.finish(result.sha256, {file: base[file] for file in sorted(result.base)})
        for relative in plan.source.side_files:
            if plan.source.folder is not None:
                writer.add(relative, plan.source.folder / relative)
        digest = {name: result.sha256 for name, result in coded.results.items()}
        rows = rows_of(coded.tensors, {name: result.tensors for name, result in coded.results.items()})
        timing = time.perf_counter() - begun, options
        report = written(coded.plan_of(plan), writer, coded.tensors, (digest, writer.digests()), base, rows, timing)
        writer.seal()
    return report
