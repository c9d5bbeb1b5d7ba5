"""Tell what an earlier run wrote at an output's place from what somebody else put there, which is never removed.

A step records the files of its output in report.json. The outputs of versions that did not are told by their names.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aicompress.checkpoint.header import PACKED, header_text, parsed_header
from aicompress.checkpoint.json_text import parsed
from aicompress.checkpoint.manifest import KEY
from aicompress.checkpoint.source import MODELING_FILES, PACKING_REPORTS, REPORTS, WEIGHT_NAMES
from aicompress.errors import CheckpointError, OutputExists

REPORT = REPORTS[0]
_SHOWN = 5  # strangers that an error names

_CONVENTIONAL = re.compile(
    r"(\d_[A-Z]\w*/)?"  # of a module of Sentence Transformers
    rf"(({'|'.join(('model', *WEIGHT_NAMES))})(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?"
    r"|(config|generation_config|aicompress)\.json|report\.(json|md|html)"
    r"|(tokenizer|special_tokens|added_tokens|vocab|merges|preprocessor|processor|chat_template|sentencepiece|spiece)"
    r"[\w.]*\.(json|model|txt|bpe|jinja)|(modeling|configuration|tokenization)_\w+\.py"
    r"|(modules|sentence_bert_config|config_sentence_transformers)\.json"
    rf"|{'|'.join(map(re.escape, MODELING_FILES))})"
)


def require_own(out: Path) -> None:
    """Refuse to replace what no run of this tool wrote.

    Raises:
        OutputExists: naming it.
    """
    others = strangers(out)
    if others:
        raise OutputExists(
            f"aicompress did not write {named(others)} in {out}" if out.is_dir() else f"aicompress did not write {out}",
            "nothing else is ever replaced: move it away, or choose another path",
        )


def named(files: list[str]) -> str:
    """Some names of files for a message, and how many more there are."""
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    return ", ".join(files[:_SHOWN]) + more


def strangers(out: Path) -> list[str]:
    """What no run of this tool wrote at an output's place, relative to it; for one file itself, or nothing.

    An empty folder or file holds nothing that could be lost.
    """
    if not os.path.lexists(out):
        return []
    if not out.is_dir():
        return [] if out.is_file() and (not out.stat().st_size or _is_own_file(out)) else [out.name]
    recorded = _recorded(out)
    return sorted(name for name in _contents(out) if name not in recorded)


def require_own_reports(folder: Path, stem: str = "") -> None:
    """Refuse to replace files that have the names of a report and are none of this tool's.

    Args:
        folder: where the report goes.
        stem: what its files' names begin with: `w4.` beside w4.safetensors.

    Raises:
        OutputExists: naming one.
    """
    there = [folder / f"{stem}{name}" for name in REPORTS if os.path.lexists(folder / f"{stem}{name}")]
    if there and not _is_report(_json(folder / f"{stem}{REPORT}")):
        raise OutputExists(
            f"a report would replace {there[0]}, which aicompress did not write",
            "nothing else is ever replaced: move it away, or choose another path",
        )


def _contents(folder: Path) -> Iterator[str]:
    """Every file below a folder, links and empty folders among them; a folder's name ends in a slash."""
    for place, folders, files in os.walk(folder, onerror=_unreadable):
        relative = Path(place).relative_to(folder)
        yield from ((relative / name).as_posix() for name in files)
        yield from ((relative / name).as_posix() for name in folders if (Path(place) / name).is_symlink())
        if not files and not folders and place != str(folder):
            yield f"{relative.as_posix()}/"


def _unreadable(error: OSError) -> None:
    raise OutputExists(
        f"{error.filename} cannot be read: {error.strerror}", "what is in it is not replaced: choose another path"
    ) from error


class _Conventional:
    """Names that the files of every version's outputs have."""

    def __contains__(self, name: object) -> bool:
        return bool(_CONVENTIONAL.fullmatch(str(name)))


def _recorded(folder: Path) -> frozenset[str] | _Conventional:
    """What a step wrote into a folder; nothing where no step did."""
    report, manifest = _json(folder / REPORT), _json(folder / f"{KEY}.json")
    others = [_json(folder / name) for name in PACKING_REPORTS if name.endswith(REPORT)]
    listing = [each for each in (report, *others) if _lists_files(each)]
    if listing:
        return frozenset(str(name) for each in listing for name in each["files"])
    stepped = isinstance(manifest, dict) and "lineage" in manifest
    return _Conventional() if _is_report(report) or stepped else frozenset()


def _lists_files(report: Any) -> bool:
    """Whether it is a report that says what a step wrote."""
    return _is_report(report) and isinstance(report.get("files"), list) and bool(report["files"])


def _is_report(plain: Any) -> bool:
    return isinstance(plain, dict) and isinstance(plain.get("schema_version"), int) and "tool_version" in plain


def _is_own_file(file: Path) -> bool:
    """Whether a weight file says in its header that a step wrote it, or the report beside it notes its digest."""
    try:
        _, metadata = parsed_header(file, header_text(file)[0])
    except CheckpointError:
        return False
    return KEY in metadata or PACKED in metadata or _is_unpacked(file)


def _is_unpacked(file: Path) -> bool:
    """Whether a file is as `unpack` wrote it, which adds nothing to its header."""
    report = _json(file.with_name(f"{file.name.removesuffix('.safetensors')}.{REPORT}"))
    if not _is_report(report) or report.get("command") != "unpack":
        return False
    noted = report["after"].get("sha256") if isinstance(report.get("after"), dict) else None
    with file.open("rb") as stream:
        return isinstance(noted, dict) and hashlib.file_digest(stream, "sha256").hexdigest() in noted.values()


def _json(file: Path) -> Any:
    try:
        return parsed(file.read_bytes())
    except (OSError, ValueError):
        return None
