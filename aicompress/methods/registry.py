"""Methods by command and name: every module of the package methods/<command>/ with a METHOD is one.

Four kinds of method, by what they are given:
    layer-wise   one layer in, one stored weight out (`layerwise.LayerMethod`)
    structural   several tensors and config.json change together (`structural.StructuralMethod`)
    channels     layers of any network lose channels together (`channels.ChannelMethod`)
    training     a loss between a teacher's and a student's outputs (`losses.DistillMethod`)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aicompress.discovery import member_in_its_file, members
from aicompress.errors import RecipeError, suggestion
from aicompress.methods.method import Method

COMMANDS = tuple(sorted({file.parent.name for file in Path(__file__).parent.glob("*/*.py")}))


def methods(command: str) -> Mapping[str, Method]:
    """List all methods of a command by name."""
    return members(f"aicompress.methods.{command}", "METHOD")


def get(command: str, name: str) -> Method:
    """Look up a method.

    Raises:
        RecipeError: no such method for this command.
    """
    alone: Method | None = member_in_its_file(f"aicompress.methods.{command}", "METHOD", name)
    if alone is not None:
        return alone
    known = methods(command)
    if name not in known:
        elsewhere = [other for other in COMMANDS if other != command and name in methods(other)]
        hint = f"it belongs to `aicompress {elsewhere[0]}`" if elsewhere else suggestion(name, list(known))
        raise RecipeError(f"{command} has no method {name!r}", hint)
    return known[name]
