"""Leave out layers that a checkpoint holds beside its architecture, once their kind is cut in the rest of the model.

Layers that predict further tokens (multi-token prediction) lie behind the last block or in a part of their own.
transformers does not load them, and no probe of config.json shows them; left at their old width beside a config.json
with the new one they would be wrong wherever they are read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from aicompress.pipeline.structured.edit import Edit

# Counts of such layers in config.json.
_COUNTS = {"num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_layers"}
_BLOCK = re.compile(r"^.*?\.\d+\.")


def without_unknown(edit: Edit, known: Collection[str]) -> Edit:
    """The edit without layers that the architecture does not know and that hold what is cut elsewhere.

    Args:
        edit: what changes.
        known: names of every tensor that the architecture has.
    """
    if not any(change.cuts for change in edit.changes.values()):
        return edit
    cut = {part.tensor for number in edit.changed for part in edit.structures[number].parts}
    cut = {name for name in cut if name in known and (name not in edit.changes or edit.changes[name].cuts)}
    kinds = {_BLOCK.sub("", name) for name in cut}
    unknown = {change.source for change in edit.changes.values()} - set(known)
    alike = [name for name in unknown if _BLOCK.match(name) and _BLOCK.sub("", name) in kinds]
    if not alike:
        return edit
    parts = _parents(known)
    prefixes = sorted({_unknown_part(name, parts) for name in alike})
    gone = {name for name in unknown if any(name.startswith(f"{prefix}.") for prefix in prefixes)}
    changes = {name: change for name, change in edit.changes.items() if change.source not in gone}
    config, counts = _without_counts(edit.config or {})
    told = f"{', '.join(prefixes)}: {len(gone)} tensors that the architecture does not know are left out, for they "
    told += "cannot be cut alike" + (f"; {', '.join(counts)} becomes 0" if counts else "")
    return replace(edit, changes=changes, config=config, warnings=(*edit.warnings, told))


def _parents(names: Collection[str]) -> set[str]:
    """Every module that any of these parameters lies in."""
    pieces = [name.split(".") for name in names]
    return {".".join(piece[:length]) for piece in pieces for length in range(1, len(piece))}


def _unknown_part(name: str, known: Collection[str]) -> str:
    """The outermost module of a parameter that the architecture does not have."""
    pieces = name.split(".")
    prefixes = [".".join(pieces[:length]) for length in range(1, len(pieces) + 1)]
    return next(prefix for prefix in prefixes if prefix not in known)


def _without_counts(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """config.json that counts no such layers, and the fields that did."""
    counts = [key for key, value in config.items() if key in _COUNTS and value]
    edited = {**config, **dict.fromkeys(counts, 0)}
    for key, value in config.items():
        if isinstance(value, dict):
            edited[key], inner = _without_counts(value)
            counts += inner
    return edited, counts
