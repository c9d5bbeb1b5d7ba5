"""Plan and run `unpack`: the files that were packed, byte for byte."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from aicompress.checkpoint.packed.folder import everything
from aicompress.checkpoint.packed.reader import OpenedPackedFile, is_packed
from aicompress.checkpoint.packed.writer import FileWriter
from aicompress.checkpoint.place import shared_mode
from aicompress.checkpoint.source import Source
from aicompress.errors import CheckpointError
from aicompress.pipeline.packing.coding import counted, unpack_file
from aicompress.pipeline.packing.plan import Base, PackingPlan, require_place, unpacked_name
from aicompress.pipeline.packing.results import Tensors, written
from aicompress.pipeline.step.checks import files_left_out, require_room
from aicompress.pipeline.step.digests import hashing
from aicompress.pipeline.step.options import Options, Progress
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.made import Direction, PackingRecipe
from aicompress.report.model import Report


@dataclass(frozen=True)
class UnpackingPlan(PackingPlan):
    """An unpacking, with the packed files; their names are those of the files that they hold."""

    packed: tuple[OpenedPackedFile, ...] = ()

    @property
    def noted(self) -> set[str]:
        """Digests of the base's files that parts of the input are the difference to."""
        return {digest for each in self.packed for digest in each.manifest.base.values()}


def make_plan(source: str | Path, destination: Destination, base: str | Path | None = None) -> UnpackingPlan:
    """Check everything that headers tell, and the digests of the base.

    Raises:
        Refused: or Problems, everything that is wrong.
    """
    files = everything(source)
    opened = tuple(OpenedPackedFile.open(file) for file in files.files if is_packed(file))
    if not opened:
        raise CheckpointError(f"{files.path} is not packed", "give what `aicompress pack` wrote")
    others = tuple(file for file in files.files if not is_packed(file))
    files = _with_copied(files, tuple(each.path for each in opened), others)
    names = {each.path: unpacked_name(files.name_of(each.path)) for each in opened}
    twice = [name for name, count in Counter([*names.values(), *map(str, files.side_files)]).items() if count > 1]
    if twice:
        raise CheckpointError(f"{files.path} holds {twice[0]} beside what unpacks to it", "move one of them away")
    if destination.single:
        names = {each.path: destination.path.name for each in opened}
    reference = None if base is None else Base.open(base)
    require_place(files, reference, destination)
    nbytes = {names[each.path]: each.manifest.nbytes for each in opened}
    recipe = PackingRecipe(method=Direction(name="unpack"))
    plan = UnpackingPlan(
        files, destination, recipe, None, names, nbytes, warnings=tuple(files_left_out(files)), packed=opened
    )
    require_room(destination.path, plan.side_bytes + sum(nbytes.values()))
    return _with_base(plan, reference)


def _with_copied(source: Source, packed: tuple[Path, ...], others: tuple[Path, ...]) -> Source:
    """The input in which weight files that are not packed are copied as any other file."""
    folder = source.folder
    side = tuple(file.relative_to(folder) for file in others if folder is not None)
    return replace(source, files=packed, side_files=(*source.side_files, *side))


def _with_base(plan: UnpackingPlan, base: Base | None) -> UnpackingPlan:
    """The plan with the base that it was packed with.

    Raises:
        CheckpointError: it is missing, or another one.
    """
    if not plan.noted and base is not None:
        return replace(plan, notes=(f"{base.source.path} is not needed: the input is no difference to a base",))
    if not plan.noted:
        return plan
    if base is None:
        raise CheckpointError(
            f"{plan.source.path} holds only the difference to a base",
            "give the base that it was packed with: --base BASE",
        )
    return replace(plan, base=base.with_digests(plan.noted))


def run(plan: UnpackingPlan, options: Options) -> Report:
    """Write what was packed, and a report.

    Raises:
        CheckpointError: the input is damaged; nothing is left behind.
        OutOfSpace: the disk is full; nothing is left behind.
    """
    begun, destination, source = time.perf_counter(), plan.destination, plan.source
    inputs = [source, *([] if plan.base is None else [plan.base.source])]
    mode = shared_mode(file for each in inputs for file in each.files)
    with FileWriter(destination.path, destination.overwrite, mode) as writer, hashing([source]) as hashed:
        decode(plan, writer, options.progress)
        for relative in source.side_files:
            if source.folder is not None:
                writer.add(relative, source.folder / relative)
        report = _report(plan, writer, hashed[0].result(), (time.perf_counter() - begun, options))
        writer.seal()
    return report


def decode(plan: UnpackingPlan, writer: FileWriter | None, progress: Progress) -> None:
    """Unpack every file; without a writer they are only checked.

    Raises:
        CheckpointError: one is damaged.
    """
    done = counted(progress, [each.header for each in plan.packed])
    for each in plan.packed:
        name = unpacked_name(plan.source.name_of(each.path))
        unpack_file(each, name, plan.base, (writer, plan.names[each.path]), done)


def _report(plan: UnpackingPlan, writer: FileWriter, inputs: dict[str, str], timing: tuple[float, Options]) -> Report:
    """The report of an unpacked output that is complete but for it."""
    names = {plan.names[each.path]: each for each in plan.packed}
    stored = {name: {key: stream.nbytes for key, stream in each.streams.items()} for name, each in names.items()}
    tensors = Tensors({name: each.header for name, each in names.items()}, stored)
    digests = {name: each.manifest.sha256 for name, each in names.items()}
    base = {} if plan.base is None else {n: d for each in plan.packed for n, d in each.manifest.base.items()}
    return written(plan, writer, tensors, (inputs, digests), base, (), timing)
