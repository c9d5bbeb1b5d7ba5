"""Digests of what a run writes, of equal runs equal wherever they ran."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

# Files whose bytes are not compared, and parts of others that constants stand for, each with the reason.
LEFT_OUT = {
    "report.*": "holds times, memory, versions and the machine",
    "*.report.*": "holds times, memory, versions and the machine",
    "*.py": "is the project's own source, which the native layout carries along; its presence is recorded",
}
REPLACED = {
    "tool": "the version of aicompress in the lineage",
    "the working folder": "a temporary one, which recorded recipes name",
    "recipe_sha256": "of recipes that name the working folder",
}
_REPORT = re.compile(r"(.*\.)?report\.(json|md|html)")
_TOOL = re.compile(rb"(tool\W+aicompress )\d[\w.+-]*")
_RECIPE = re.compile(rb"(recipe_sha256\W+)[0-9a-f]{64}")


def digests(folder: Path, work: Path) -> dict[str, str]:
    """sha256 of every file under a folder but reports, by path; source files have a word in its place.

    Args:
        folder: what a run has written.
        work: the folder that all runs work in.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _REPORT.fullmatch(path.name)]
    return {path.relative_to(folder).as_posix(): _digest(path, work) for path in paths}


def _digest(path: Path, work: Path) -> str:
    if path.suffix == ".py":
        return "source"
    return hashlib.sha256(comparable(path.read_bytes(), work)).hexdigest()


def comparable(content: bytes, work: Path) -> bytes:
    """Content of a file with constants for what another run may record of itself.

    That is the version of the tool, and the working folder, which recorded recipes name, with the digests of these
    recipes. The folder's constant is as long as its path, so that headers keep their length.
    """
    content = _TOOL.sub(rb"\g<1>VERSION", content)
    name = str(work).encode()
    if name not in content:
        return content
    return _RECIPE.sub(rb"\g<1>" + b"0" * 64, content.replace(name, b"." * len(name)))


def quality(folder: Path) -> dict[str, Any]:
    """What an evaluation measured of the outputs, without what it timed."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    figures: dict[str, Any] = report["quality"]
    return figures


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """A value for each path of keys, joined by ': '."""
    values: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            values |= {f"{key}: {rest}": leaf for rest, leaf in flat(value).items()}
        else:
            values[key] = value
    return values


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line for each value that is another, is missing or is new."""
    old, new = flat(before), flat(after)
    changed = [f"changed  {key}" for key in old if key in new and old[key] != new[key]]
    missing = [f"missing  {key}" for key in old if key not in new]
    return [*changed, *missing, *(f"new      {key}" for key in new if key not in old)]
