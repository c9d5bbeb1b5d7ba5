"""How a method is found: every module under methods/<command>/ that has a METHOD.

Four kinds of method, by what they are given:
    layer-wise   one layer in, one stored weight out (`layerwise.LayerMethod`)
    structural   several tensors and config.json change together (`structural.StructuralMethod`)
    channels     layers of any network lose channels together (`structural.ChannelMethod`)
    training     a loss between a teacher's and a student's outputs (`training.DistillMethod`)
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from functools import cache

import torch

from aicompress.errors import RecipeError, suggestion
from aicompress.methods.method import Method

COMMANDS = ("factorize", "quantize", "prune", "distill")


@cache
def methods(command: str) -> Mapping[str, Method]:
    """All methods of a command by name. A method file that does not import raises: nothing is skipped silently."""
    package = importlib.import_module(f"aicompress.methods.{command}")
    found: dict[str, Method] = {}
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        method = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "METHOD", None)
        if method is None:
            continue  # shared math of several methods
        if method.name in found:
            raise TypeError(f"two {command} methods are named {method.name!r}")
        found[method.name] = method
    return found


def get(command: str, name: str) -> Method:
    """Look up a method.

    Raises:
        RecipeError: no such method for this command.
    """
    alone = _in_its_file(command, name)
    if alone is not None:
        return alone
    known = methods(command)
    if name not in known:
        elsewhere = [other for other in COMMANDS if other != command and name in methods(other)]
        hint = f"it belongs to `aicompress {elsewhere[0]}`" if elsewhere else suggestion(name, list(known))
        raise RecipeError(f"{command} has no method {name!r}", hint)
    return known[name]


@cache
def _in_its_file(command: str, name: str) -> Method | None:
    """The method of a module with its name, found without importing the others; None where there is none."""
    module = f"aicompress.methods.{command}.{name}"
    if not name.isidentifier() or importlib.util.find_spec(module) is None:
        return None
    method: Method | None = getattr(importlib.import_module(module), "METHOD", None)
    return method if method is not None and method.name == name else None


def floating(dtype: torch.dtype) -> bool:
    """Whether a parameter of this dtype can be compressed."""
    return dtype.is_floating_point
