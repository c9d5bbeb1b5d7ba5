"""JSON schemas of recipes, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from aicompress.errors import Refused, suggestion
from aicompress.methods.method import MethodConfig
from aicompress.methods.modes import modes
from aicompress.methods.registry import COMMANDS, methods
from aicompress.recipe.distillation import DistillRecipe
from aicompress.recipe.evaluation import recipe_class
from aicompress.recipe.section import Section
from aicompress.recipe.step import Recipe


def schema(command: str) -> dict[str, Any]:
    """The JSON schema of a command's recipe; `method` is one of the command's methods, told apart by its name.

    Raises:
        Refused: there is no such command.
    """
    kinds: dict[str, type[Section]] = {"distill": DistillRecipe, "eval": recipe_class()}
    if command not in (*COMMANDS, "eval"):
        raise Refused(f"there is no command {command!r}", suggestion(command, (*COMMANDS, "eval")))
    whole = TypeAdapter(kinds.get(command, Recipe)).json_schema()
    if command == "eval":
        return whole
    options = [_named(whole, method.config) for method in methods(command).values()]
    whole["properties"]["method"] = {"oneOf": options}
    if command == "distill":
        whole["properties"]["also"]["items"] = {"oneOf": options}
        by_name = {"enum": list(modes())}
        whole["properties"]["mode"] = {"oneOf": [by_name, *(_named(whole, mode.config) for mode in modes().values())]}
    return whole


def _named(whole: dict[str, Any], config: type[MethodConfig]) -> dict[str, Any]:
    """The schema of parameters that are known by their name, what it refers to moved into the whole."""
    plain = config.model_json_schema(ref_template="#/$defs/{model}")
    whole.setdefault("$defs", {}).update(plain.pop("$defs", {}))
    return {**plain, "required": sorted({*plain.get("required", []), "name"})}
