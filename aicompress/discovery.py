"""Find the members of a package: one file each, known by an object of an agreed name."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any


def members(package: str, attribute: str) -> Mapping[str, Any]:
    """List the objects called `attribute` of a package's modules by their `name`, in the order of the modules.

    The package's folders are looked at anew when its `__path__` changes. A module without the attribute is skipped: it
    holds what several members share. A module that does not import raises: nothing is skipped silently.

    Args:
        package: dotted name.
        attribute: for example METHOD.

    Raises:
        TypeError: two members have one name.
    """
    return _members(package, tuple(importlib.import_module(package).__path__), attribute)


def member_in_its_file(package: str, attribute: str, name: str) -> Any | None:
    """The member whose module has its name, found without importing the others; None where there is none."""
    module = f"{package}.{name}"
    if not name.isidentifier() or importlib.util.find_spec(module) is None:
        return None
    member = getattr(importlib.import_module(module), attribute, None)
    return member if member is not None and member.name == name else None


@cache
def _members(package: str, folders: tuple[str, ...], attribute: str) -> Mapping[str, Any]:
    by_name: dict[str, Any] = {}
    for module in sorted(pkgutil.iter_modules(folders), key=lambda each: each.name):
        member = getattr(importlib.import_module(f"{package}.{module.name}"), attribute, None)
        if member is None:
            continue
        if member.name in by_name:
            raise TypeError(f"two files of {package} are named {member.name!r}")
        by_name[member.name] = member
    return by_name
