"""The plan of a packing: the files that are coded, the files that are copied, the place of the output."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aicompress.checkpoint.header import PACKED_SUFFIX
from aicompress.checkpoint.place import require_apart, require_free, working_path
from aicompress.checkpoint.source import Source
from aicompress.disk import require_writable
from aicompress.errors import CompressError, OutOfSpace, Refused, listed, raise_all
from aicompress.pipeline.packing.base_checkpoint import Base
from aicompress.pipeline.step.checks import problem_of
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.packing import PackingRecipe
from aicompress.report.plan import PlanRow, PlanSummary

SUFFIX = ".safetensors"
SPARE = 1_000_000  # bytes for the report


@dataclass(frozen=True)
class PackingPlan:
    """A packing, or an unpacking, that can be run or printed.

    Attributes:
        source: every file of the input.
        destination: where the output goes.
        recipe: what to do.
        base: what is stored as the difference to it.
        names: the output's name of each weight file of the input.
        nbytes: exact bytes of each of these; empty until they are known.
        rows: the layers, as far as they have been coded.
        warnings: what the user should know.
        notes: what was settled.
    """

    source: Source
    destination: Destination
    recipe: PackingRecipe
    base: Base | None
    names: dict[Path, str]
    nbytes: dict[str, int]
    rows: tuple[PlanRow, ...] = ()
    unchanged: int = 0
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def side_bytes(self) -> int:
        """Bytes of the files that are copied."""
        folder = self.source.folder
        return sum((folder / name).stat().st_size for name in self.source.side_files) if folder is not None else 0

    def summary(self) -> PlanSummary:
        """What a dry run prints."""
        return PlanSummary(
            command=self.recipe.method.name,
            source=str(self.source.path),
            out=str(self.destination.path),
            method=self.recipe.method.model_dump(mode="json"),
            rows=self.rows,
            unchanged=self.unchanged,
            weight_files=self.nbytes,
            other_bytes=self.side_bytes,
            bytes_before=sum(file.stat().st_size for file in self.source.files),
            warnings=self.warnings,
            layout=self.recipe.method.layout,
            notes=self.notes,
        )


def require_place(source: Source, base: Base | None, destination: Destination) -> None:
    """Refuse a place of the output that is taken, or that would change an input.

    Raises:
        Refused: or Problems, everything that is wrong with it.
    """
    out = destination.path
    problems: list[CompressError] = []
    for each in (source, *([] if base is None else [base.source])):
        problems += problem_of(partial(require_apart, each, out))
    if not problems:
        problems += problem_of(lambda: require_free(out, destination.overwrite))
    if destination.single and source.folder is not None:
        hint = "name a directory, or give one file as IN"
        problems.append(Refused(f"{out} is one file, and {source.path} holds others beside its weights", hint))
    raise_all(problems)
    require_writable(out)


def require_space(destination: Destination, needed: int) -> None:
    """Refuse an output that does not fit the disk.

    Raises:
        OutOfSpace: it does not.
    """
    folder = next(parent for parent in working_path(destination.path).parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed + SPARE > free:
        raise OutOfSpace(
            f"the output takes {needed:,} bytes and {folder} has {free:,} free", "free space, or write elsewhere"
        )


def packed_name(name: str) -> str:
    """The name of a packed file in a directory: one that no reader of weights looks for."""
    return f"{name.removesuffix(SUFFIX)}{PACKED_SUFFIX}"


def unpacked_name(name: str) -> str:
    """The name of the file that a packed one holds."""
    return f"{name.removesuffix(PACKED_SUFFIX)}{SUFFIX}" if name.endswith(PACKED_SUFFIX) else name


def left_out(source: Source) -> list[str]:
    """Warnings that name what is not taken along."""
    kinds = {"not taken along": source.left_out, "links out of the folder, left out": source.outside}
    return [f"{why}: {listed(files, 5)}" for why, files in kinds.items() if files]
