"""Parameters of methods that prepare a layer, or correct it, and leave the rounding to another method."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, field_validator

from aicompress.errors import RecipeError
from aicompress.methods.layerwise import AnyLayerMethod, LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.methods.quantize.grid.widths import open_bits
from aicompress.methods.registry import get


class BasedConfig(MethodConfig):
    """Parameters with a base method among them.

    Attributes:
        lends: statistics that a base method may read.
        unfit: what is said of a method that cannot be a base.
        refuses: methods that cannot be, whatever they read.
    """

    lends: ClassVar[frozenset[str]]
    unfit: ClassVar[str]
    refuses: ClassVar[frozenset[str]] = frozenset()

    base: dict[str, Any] = Field(
        {"name": "gptq"}, description="the method that quantizes, with its parameters, as a method: section gives them"
    )

    @field_validator("base")
    @classmethod
    def _known(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The method exists, rewrites no other layer, reads what there is, and takes these parameters."""
        try:
            method = get("quantize", str(given.get("name")))
        except RecipeError as error:
            raise ValueError(f"{error.message}; {error.hint}") from None
        fits = isinstance(method, LayerMethod) and not method.rewrites and method.needs <= cls.lends
        if not fits or method.name in cls.refuses:
            raise ValueError(f"{method.name} {cls.unfit}")
        config = method.config(**given)
        if open_bits(config):
            raise ValueError("base needs explicit bits")
        return config.model_dump()

    def fitted(self, columns: int) -> Self:
        """Groups of the base that divide a layer's columns, where they have the size of its defaults."""
        method, base = base_of(self)
        unset = {"group_size"} if _by_default(base, "group_size") else set()
        fitted = method.config(**base.model_dump(exclude=unset)).fitted(columns)
        return self.model_copy(update={"base": fitted.model_dump()})


def _by_default(config: MethodConfig, name: str) -> bool:
    """Whether a field has its default."""
    field = type(config).model_fields.get(name)
    return field is not None and getattr(config, name) == field.default


def base_of(config: BasedConfig) -> tuple[AnyLayerMethod, MethodConfig]:
    """The method that quantizes, and its parameters."""
    method = get("quantize", config.base["name"])
    assert isinstance(method, LayerMethod)
    return method, method.config(**config.base)


def base_shift(config: BasedConfig) -> float:
    """How far the base method moves its target to make up for compressed layers before it."""
    method, base = base_of(config)
    return method.shift(base)
