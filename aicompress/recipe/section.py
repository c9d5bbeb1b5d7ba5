"""What all recipes are made of: strict sections, their problems in plain words, paths relative to the recipe."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aicompress.data.section import Data
from aicompress.errors import RecipeError, raise_all, suggestion
from aicompress.methods import MethodConfig

UNNAMED = ("<list>", "<section>")  # what a key may be, as pydantic tells them apart; no part of a recipe's own names

SHARES = ("sparsity", "keep", "energy", "share")

RecipePart = TypeVar("RecipePart", bound=BaseModel)


def optional(description: str, default: Any = None, **bounds: Any) -> Any:
    """A field recorded only where it is not its default: recipes from before there was one keep their digests."""
    return Field(default, exclude_if=lambda value: value == default, description=description, **bounds)


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def relative_to(self, folder: Path) -> Self:
        """The same with its paths made absolute from a recipe's folder."""
        parts = {name: part for name, part in self if isinstance(part, Section | Data | MethodConfig)}
        return self.model_copy(update={name: part.relative_to(folder) for name, part in parts.items()})


class WholeRecipe(Section):
    """A recipe, not a part of one: its resolved fields and their digest are stored with what it made."""

    def resolved(self) -> dict[str, Any]:
        """Every field with its value, JSON-ready."""
        return self.model_dump(mode="json")

    def sha256(self) -> str:
        """Digest of the resolved recipe."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


class Model(Section):
    """How to run a checkpoint that names no architecture."""

    sequential: tuple[str, ...] = Field(
        (),
        description="layers and operations in order: [flatten, fc1, relu, fc2]; some take a number: maxpool:2",
    )
    factory: str | None = Field(None, description="pkg.mod:function that builds the module; needs --allow-code")


class StoredCodes(WholeRecipe):
    """A recipe whose output may hold codes, and how it stores them."""

    storage: Literal["fixed", "entropy"] | None = optional(
        "codes, indices and masks. fixed: of a fixed width; entropy: entropy-coded; where it is not given, "
        "as the input has them"
    )


class ReportFiles(Section):
    """Which files a report is written to, beside report.json and report.md; nothing here changes a number."""

    html: bool = Field(True, description="write report.html, a page with plots")


def validated(kind: type[RecipePart], fields: dict[str, Any], where: str) -> RecipePart:
    """Build a pydantic model; every problem becomes one line with a hint.

    Raises:
        RecipeError: or Problems, when there are several.
    """
    known = kind.model_fields
    given = {name: value for name, value in fields.items() if value is not None or _may_be_null(known.get(name))}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise_all([_explain(problem, kind, where, fields) for problem in error.errors()])
        raise AssertionError("unreachable") from error


def _may_be_null(field: Any) -> bool:
    """Whether null is a value of a field; of one with a default it takes back what was given, or was left empty."""
    return field is None or field.is_required() or type(None) in getattr(field.annotation, "__args__", ())


def _explain(problem: Any, kind: type[BaseModel], where: str, fields: dict[str, Any]) -> RecipeError:
    pieces = [piece for piece in problem["loc"] if piece not in UNNAMED]
    path = ".".join(map(str, pieces))
    place = ".".join(piece for piece in (where, path) if piece)
    if problem["type"] == "extra_forbidden":
        word = str(pieces[-1])
        if word == "ratio":
            return RecipeError(
                f"{place}: 'ratio' is ambiguous", "say sparsity, keep, rank, energy, bits or target_bytes"
            )
        elsewhere = [] if pieces[:-1] or where else _paths_to(word, kind, fields)
        hint = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
        return RecipeError(f"{place}: unknown key", hint or suggestion(word, list(_fields_at(kind, pieces[:-1]))))
    if problem["type"] == "missing":
        return RecipeError(f"{place}: missing", "add it to the recipe")
    if problem["type"] in ("tuple_type", "list_type"):
        given = _shown(problem["input"])
        return RecipeError(f"{place}: is not a list, got {given}"[:300], f"put it in brackets: {place}=[{given}]"[:300])
    message = str(problem["msg"]).removeprefix("Value error, ")
    told = f"{place}: {message[0].lower()}{message[1:]}, got {_shown(problem['input'])}"[:300]
    return RecipeError(told, _meant(str(pieces[-1]) if pieces else "", problem["input"]))


def _meant(field: str, given: Any) -> str:
    """A hint for what is often written for a field in the place of what it takes; empty for anything else."""
    number = given if isinstance(given, int | float) and not isinstance(given, bool) else None
    if field == "pattern" and isinstance(number, int) and 60 < number < 1000:  # YAML counts 2:4 in minutes
        return f'quote it, pattern: "{number // 60}:{number % 60}", for YAML reads that as {number}'
    if field == "bits" and isinstance(number, int) and number >= 16:
        return "a layer that is to stay as it is has `skip: true` in its rule"
    if field == "bits" and isinstance(given, str) and given.strip().isdecimal():
        return f"write it without quotes: bits: {given.strip()}"
    percent = given.rstrip(" %") if isinstance(given, str) else "" if number is None else f"{number:g}"
    if field in SHARES and percent.isdecimal() and 1 < int(percent) <= 100:
        return f"it is a share: {int(percent) / 100:g} for {percent} %"
    return ""


def _shown(value: Any) -> str:
    """What was given, without building more of it than a line holds."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 8
    return short.repr(value)


def _paths_to(word: str, kind: Any, fields: dict[str, Any]) -> list[str]:
    """Dotted paths of the keys of this name in the sections of a recipe, for a key that was given outside of any.

    Args:
        word: the key.
        kind: the recipe's class.
        fields: what was given; a section that is validated already is of a class of its own.
    """
    paths: list[str] = []
    for name, field in kind.model_fields.items():
        given = fields.get(name)
        kinds = [type(given)] if isinstance(given, BaseModel) else _models(field.annotation)
        for section in kinds:
            paths += [f"{name}.{word}"] if word in section.model_fields else []
            paths += [f"{name}.{path}" for path in _paths_to(word, section, {})]
    return paths


def _models(annotation: Any) -> list[Any]:
    """The sections that a field of this type can hold, such as X of `X | None`."""
    return [each for each in (annotation, *getattr(annotation, "__args__", ())) if hasattr(each, "model_fields")]


def _fields_at(kind: Any, path: Sequence[Any]) -> Sequence[str]:
    """Field names of the section that a location points into."""
    for step in path:
        field = kind.model_fields.get(step) if isinstance(step, str) and hasattr(kind, "model_fields") else None
        if field is not None:
            kind = next(iter(_models(field.annotation)), kind)
    return list(kind.model_fields)
