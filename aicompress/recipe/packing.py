"""What `pack` and `unpack` are asked for."""

from __future__ import annotations

from typing import Literal

from aicompress.recipe.export import MadeRecipe
from aicompress.recipe.section import Section


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
