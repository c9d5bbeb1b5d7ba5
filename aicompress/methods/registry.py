"""Methods by command and name: every module of the package methods/<command>/ with a METHOD is one.

Four kinds of method, by what they are given:
    layer-wise   one layer in, one stored weight out (`layerwise.LayerMethod`)
    structural   several tensors and config.json change together (`structural.StructuralMethod`)
    channels     layers of any network lose channels together (`structural.ChannelMethod`)
    training     a loss between a teacher's and a student's outputs (`training.DistillMethod`)
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import ModuleType

import torch

from aicompress.errors import RecipeError, suggestion
from aicompress.methods.method import Method

COMMANDS = ("factorize", "quantize", "prune", "distill")


def discover(package: ModuleType) -> dict[str, Method]:
    """The METHOD of every module of a package, by name. A file that does not import raises: nothing is skipped.

    Raises:
        TypeError: two of them have one name.
    """
    by_name: dict[str, Method] = {}
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        method = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "METHOD", None)
        if method is None:
            continue  # shared math of several methods
        if method.name in by_name:
            raise TypeError(f"two methods of {package.__name__} are named {method.name!r}")
        by_name[method.name] = method
    return by_name


@cache
def methods(command: str) -> Mapping[str, Method]:
    """All methods of a command by name."""
    return discover(importlib.import_module(f"aicompress.methods.{command}"))


def get(command: str, name: str) -> Method:
    """Look up a method.

    Raises:
        RecipeError: no such method for this command.
    """
    known = methods(command)
    if name not in known:
        elsewhere = [other for other in COMMANDS if other != command and name in methods(other)]
        hint = f"it belongs to `aicompress {elsewhere[0]}`" if elsewhere else suggestion(name, list(known))
        raise RecipeError(f"{command} has no method {name!r}", hint)
    return known[name]


def floating(dtype: torch.dtype) -> bool:
    """Whether a parameter of this dtype can be compressed."""
    return dtype.is_floating_point
