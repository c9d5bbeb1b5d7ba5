"""Recipes: strict YAML, validated before anything runs. The resolved recipe is what is stored and hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aicompress.data.section import Data
from aicompress.errors import CompressError, RecipeError, raise_all, suggestion
from aicompress.layer import KINDS, Kind, LayerInfo
from aicompress.methods import MethodConfig, get
from aicompress.selection import in_levels, matches, unmatched, unreached

DEFAULT_KINDS: tuple[Kind, ...] = ("linear", "conv")


RecipePart = TypeVar("RecipePart", bound=BaseModel)


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Select(Section):
    """Which layers the method acts on."""

    include: tuple[str, ...] = Field(
        (), description="exact names, globs or re: patterns; none means every layer of `kinds`"
    )
    exclude: tuple[str, ...] = Field((), description="the same; exclude wins")
    kinds: tuple[Kind, ...] = Field(DEFAULT_KINDS, description="linear, conv, embedding, head")


class Rule(Section):
    """Method fields for the layers of one pattern; the first rule that matches a layer wins."""

    model_config = ConfigDict(extra="allow", frozen=True)

    match: str
    skip: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Level(Section):
    """Method fields for a span of depths: hierarchical compression."""

    model_config = ConfigDict(extra="allow", frozen=True)

    layers: str
    skip: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Model(Section):
    """How to run a checkpoint that names no architecture."""

    sequential: tuple[str, ...] = Field(
        (),
        description="layers and operations in order: [flatten, fc1, relu, fc2]; some take a number: maxpool:2",
    )
    factory: str | None = Field(None, description="pkg.mod:function that builds the module; needs --allow-code")


class Recipe(Section):
    """A recipe of factorize, quantize or prune."""

    version: Literal[1]
    method: MethodConfig
    select: Select = Select()
    rules: tuple[Rule, ...] = ()
    levels: tuple[Level, ...] = ()
    model: Model | None = None
    calibration: Data | None = None
    seed: int = Field(0, ge=0)
    gates: tuple[str, ...] = ()

    def sha256(self) -> str:
        """Digest of the resolved recipe."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()

    def resolved(self) -> dict[str, Any]:
        """Every field with its value, JSON-ready."""
        return {**self.model_dump(mode="json"), "method": self.method.model_dump(mode="json")}

    def problems(self, layers: Sequence[LayerInfo]) -> list[CompressError]:
        """Rules and levels that match nothing."""
        spans = [level.layers for level in self.levels]
        return unmatched([rule.match for rule in self.rules], layers, "rules") + unreached(spans, layers)

    def config_for(self, layer: LayerInfo) -> tuple[MethodConfig | None, str]:
        """The method's parameters for a layer and the rule that gave them; None where a rule skips it.

        Raises:
            RecipeError: a rule's fields are not the method's.
        """
        for number, rule in enumerate(self.rules):
            if matches(rule.match, layer):
                return self._with(rule, f"rules[{number}]: {rule.match}")
        for number, level in enumerate(self.levels):
            if in_levels(layer, level.layers):
                return self._with(level, f"levels[{number}]: {level.layers}")
        return self.method, "method"

    def _with(self, part: Rule | Level, where: str) -> tuple[MethodConfig | None, str]:
        if part.skip:
            return None, where
        given = self.method.model_dump(exclude_unset=True)
        if "preset" in part.fields:
            given = {"name": given["name"]}
        if any(field in part.fields for field in self.method.one_of):
            given = {key: value for key, value in given.items() if key not in self.method.one_of}
        return validated(type(self.method), {**given, **part.fields}, where), where


def validated(kind: type[RecipePart], fields: dict[str, Any], where: str) -> RecipePart:
    """Build a pydantic model; every problem becomes one line with a hint.

    Raises:
        RecipeError: or Problems, when there are several.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise_all([_explain(problem, kind, where) for problem in error.errors()])
        raise AssertionError("unreachable") from error


def _explain(problem: Any, kind: type[BaseModel], where: str) -> RecipeError:
    path = ".".join(str(piece) for piece in problem["loc"])
    place = ".".join(piece for piece in (where, path) if piece)
    if problem["type"] == "extra_forbidden":
        word = str(problem["loc"][-1])
        if word == "ratio":
            return RecipeError(
                f"{place}: 'ratio' is ambiguous", "say sparsity, keep, rank, energy, bits or target_bytes"
            )
        return RecipeError(f"{place}: unknown key", suggestion(word, list(_fields_at(kind, problem["loc"][:-1]))))
    if problem["type"] == "missing":
        return RecipeError(f"{place}: missing", "add it to the recipe")
    message = str(problem["msg"]).removeprefix("Value error, ")
    return RecipeError(f"{place}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"[:300], "")


def _fields_at(kind: Any, path: Sequence[Any]) -> Sequence[str]:
    """Field names of the section that a location points into."""
    for step in path:
        field = kind.model_fields.get(step) if isinstance(step, str) and hasattr(kind, "model_fields") else None
        if field is not None:
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            kind = next((k for k in kinds if hasattr(k, "model_fields")), kind)
    return list(kind.model_fields)


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Hashable, Any]:
    loader.flatten_mapping(node)
    found: dict[Hashable, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise RecipeError(f"line {key_node.start_mark.line + 1}: a key is a list or a mapping", "quote it")
        if key in found:
            raise RecipeError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice", "keep one of them")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_text(path: Path) -> str:
    """A recipe's text.

    Raises:
        RecipeError: it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read as text", "give a YAML file") from error


def read_yaml(text: str, name: str) -> dict[str, Any]:
    """Parse a recipe's text.

    Raises:
        RecipeError: not YAML, not a mapping, or a key given twice.
    """
    try:
        plain = yaml.load(text, Loader=_UniqueKeys)
    except RecursionError as error:
        raise RecipeError(f"{name} is nested too deeply", "start from a recipe in configs/") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{name} is not YAML{where}: {getattr(error, 'problem', error)}", "check the indentation"
        ) from error
    if not isinstance(plain, dict):
        raise RecipeError(
            f"{name} is not a recipe: it must be a mapping with `version: 1`", "start from one in configs/"
        )
    return plain


def with_overrides(plain: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `--set method.bits=3` edits before validation; values are YAML, list items go by number.

    Raises:
        RecipeError: not KEY=VALUE, or a path through something that is not a mapping.
    """
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not path:
            raise RecipeError(f"--set {override!r} is not KEY=VALUE", "for example --set method.bits=3")
        *parents, last = path.split(".")
        target: Any = plain
        for parent in parents:
            target = target[_item(target, parent, path)] if isinstance(target, list) else target.setdefault(parent, {})
            if not isinstance(target, dict | list):
                raise RecipeError(f"--set {path}: {parent!r} holds a value, not a section", "")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {path}: {value!r} is not YAML", "quote it") from error
        target[_item(target, last, path) if isinstance(target, list) else last] = parsed
    return plain


def _item(items: list[Any], number: str, path: str) -> int:
    """A list item's number, counted from 0."""
    if not number.isdigit() or int(number) >= len(items):
        raise RecipeError(f"--set {path}: {number!r} is not one of its {len(items)} items", "items count from 0")
    return int(number)


def shipped() -> Path:
    """Folder of the shipped recipes: inside an installed package, or configs/ of a source tree."""
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def find(name: str) -> Path:
    """A recipe file by path, or a shipped one by name such as `quantize/rtn-w4`.

    Raises:
        RecipeError: neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = shipped()
    known = {str(p.relative_to(folder).with_suffix("")): p for p in sorted(folder.rglob("*.yaml"))}
    if name.removesuffix(".yaml") in known:
        return known[name.removesuffix(".yaml")]
    raise RecipeError(f"recipe {name!r} is neither a file nor a shipped recipe", suggestion(name, list(known)))


def load(name: str, command: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe of factorize, quantize or prune.

    Raises:
        RecipeError, Problems: what is wrong, with hints.
    """
    path = find(name)
    plain = with_overrides(read_yaml(read_text(path), path.name), overrides)
    method = plain.get("method")
    if not isinstance(method, dict) or "name" not in method:
        raise RecipeError(f"{path.name}: method.name is missing", f"see `aicompress methods {command}`")
    config = validated(get(command, str(method["name"])).config, method, "method")
    return absolute(validated(Recipe, {**plain, "method": config}, ""), path.parent)


def absolute(recipe: RecipePart, folder: Path) -> RecipePart:
    """Make the paths of every Data section absolute: they are relative to the recipe's folder."""
    changed: dict[str, Any] = {}
    for name, value in recipe:
        if isinstance(value, Data):
            changed[name] = value.relative_to(folder)
        elif isinstance(value, Section) and not isinstance(value, MethodConfig):
            changed[name] = absolute(value, folder)
    return recipe.model_copy(update=changed)


__all__ = ["DEFAULT_KINDS", "KINDS", "Data", "Level", "Model", "Recipe", "Rule", "Section", "Select", "find", "load"]
