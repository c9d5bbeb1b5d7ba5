"""How a structural unit is found: every module under units/ that has a UNIT."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from aicompress.methods.structural import Unit
from aicompress.pipeline.structured import units
from aicompress.pipeline.structured.unit import AnyUnit


@cache
def structural_units() -> Mapping[type[Unit], AnyUnit]:
    """All structural units by the class that methods name them by. A file that does not import raises."""
    by_kind: dict[type[Unit], AnyUnit] = {}
    for module in sorted(pkgutil.iter_modules(units.__path__), key=lambda m: m.name):
        unit = getattr(importlib.import_module(f"{units.__name__}.{module.name}"), "UNIT", None)
        if unit is None:
            continue  # what the file of a unit reads
        if unit.kind in by_kind:
            raise TypeError(f"two structural units are of the kind {unit.kind.__name__}")
        by_kind[unit.kind] = unit
    return by_kind


def unit_for(unit: Unit) -> AnyUnit:
    """What handles the units of a kind.

    Raises:
        TypeError: no file under units/ does.
    """
    handler = structural_units().get(type(unit))
    if handler is None:
        raise TypeError(f"no file of pipeline/structured/units handles {type(unit).__name__}")
    return handler
