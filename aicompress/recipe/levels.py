"""Levels of a recipe: groups of layers with method fields, and budgets, of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from aicompress.layer import LayerInfo
from aicompress.recipe.section import UNNAMED, Section, optional
from aicompress.selection import from_the_start, in_levels, matches


class MethodFields(Section):
    """Fields of the method beside a section's own."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def fields(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Level(MethodFields):
    """Method fields for the layers of a span of depths or of a pattern; a budget among them is the level's own."""

    layers: str | None = optional('depths, counted from 0, or from -1 at the end: "0-1", "0-1,10-11", "-2--1"')
    match: str | None = optional("an exact name, a glob or a re: pattern")
    skip: bool = False

    @field_validator("layers", mode="before")
    @classmethod
    def _depths(cls, layers: Any) -> Any:
        """Numbers as YAML has them: `layers: -1`, `layers: [0, 2]`."""
        depths = layers if isinstance(layers, list) else [layers]
        numbers = depths and all(isinstance(depth, int) and not isinstance(depth, bool) for depth in depths)
        return ",".join(map(str, depths)) if numbers else layers

    @model_validator(mode="after")
    def _by_depth_or_by_pattern(self) -> Level:
        if (self.layers is None) == (self.match is None):
            raise ValueError("give a level exactly one of layers and match")
        return self

    @property
    def members(self) -> str:
        """What says which layers it has."""
        return self.layers or self.match or ""

    def holds(self, layer: LayerInfo) -> bool:
        """Whether a layer belongs to it; depths from the end have been counted.

        Raises:
            RecipeError: the depths or the pattern cannot be read.
        """
        if self.match is not None:
            return matches(self.match, layer)
        return in_levels(layer, self.layers or "")

    def counted(self, layers: Sequence[LayerInfo]) -> Level:
        """The level with depths that are counted from the end counted from the start."""
        if self.layers is None:
            return self
        return self.model_copy(update={"layers": from_the_start(self.layers, layers)})


class LevelValues(MethodFields):
    """Method fields for the layers of a level that is found."""

    skip: bool = False


class MeasuredLevels(Section):
    """Contiguous levels that are found by how sensitive the model's blocks are."""

    auto: int = Field(ge=1, description="how many levels")
    values: tuple[LevelValues, ...] = Field(description="method fields of each, from the most sensitive to the least")

    @model_validator(mode="after")
    def _values_for_all(self) -> MeasuredLevels:
        if len(self.values) != self.auto:
            raise ValueError(f"auto: {self.auto} needs {self.auto} values, from the most sensitive level to the least")
        return self


def _member(given: Any) -> str:
    return UNNAMED[1] if isinstance(given, Mapping | MeasuredLevels) else UNNAMED[0]


Levels = Annotated[
    Annotated[tuple[Level, ...], Tag(UNNAMED[0])] | Annotated[MeasuredLevels, Tag(UNNAMED[1])], Discriminator(_member)
]
