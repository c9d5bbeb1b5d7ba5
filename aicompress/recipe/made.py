"""Recipes that the command line makes: of `export`, and of `pack` and `unpack`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aicompress.recipe.section import ReportFiles, Section, StoredCodes


class Target(Section):
    """The form of the output."""

    name: Literal["dense", "compact", "entropy", "fixed"] = "dense"

    @property
    def decodes(self) -> bool:
        """Whether every weight is decoded; else all stay as they are stored."""
        return self.name == "dense"

    @property
    def shortens(self) -> bool:
        """Whether the file's header becomes a short one."""
        return self.name == "compact"


class MadeRecipe(StoredCodes):
    """A recipe that the command line makes, so that a lineage says what was done as it does of any step."""

    version: Literal[1] = 1
    method: Section = Section()
    seed: int = 0
    gates: tuple[str, ...] = ()
    report: ReportFiles = Field(ReportFiles(), exclude=True)


class ExportRecipe(MadeRecipe):
    """A recipe of export."""

    method: Target = Target()


class Direction(Section):
    """Whether a checkpoint is packed or unpacked."""

    name: Literal["pack", "unpack"]

    @property
    def layout(self) -> str:
        """What the output is, in words."""
        return "packed" if self.name == "pack" else "as before it was packed"


class PackingRecipe(MadeRecipe):
    """A recipe of pack or unpack."""

    method: Direction
