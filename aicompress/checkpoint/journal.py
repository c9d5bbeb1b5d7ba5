"""The journal of a run: the parameters it has written, so that a later run resumes after them.

One JSON line a parameter, after its bytes are in the working file. It survives the process; after a power failure start
again. The first line is a fingerprint of everything that decides the output's bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aicompress.errors import Refused

NAME = "journal.jsonl"


@dataclass(frozen=True)
class Journal:
    """Finished parameters and what was noted of each.

    Attributes:
        path: the journal's file.
        done: notes by parameter.
    """

    path: Path
    done: dict[str, Any]

    @classmethod
    def start(cls, work: Path, fingerprint: str, name: str = NAME) -> Journal:
        """A new journal in a working directory."""
        path = work / name
        path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
        return cls(path, {})

    @classmethod
    def resume(cls, work: Path, fingerprint: str, name: str = NAME) -> Journal:
        """Go on with the journal of a stopped run; a new one when there is none.

        Raises:
            Refused: the stopped run had another input, recipe or version.
        """
        path = work / name
        if not path.is_file():
            return cls.start(work, fingerprint, name)
        left = cls.read(work, fingerprint, name)
        # Written anew, for a kill may have cut off the last line, and another one must not go on from there.
        fresh, first = path.with_suffix(".new"), json.dumps({"fingerprint": fingerprint})
        fresh.write_text("\n".join([first, *map(_line, left.done.items())]) + "\n", encoding="utf-8")
        fresh.replace(path)
        return left

    @classmethod
    def read(cls, work: Path, fingerprint: str, name: str = NAME) -> Journal:
        """The journal of a stopped run as it left it; an empty one where there is none.

        Raises:
            Refused: the stopped run had another input, recipe or version.
        """
        path = work / name
        require_same(work, fingerprint, name)
        rest = path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []
        return cls(path, {note["parameter"]: note["note"] for note in map(_parsed, rest) if "parameter" in note})

    def record(self, parameter: str, note: Any) -> None:
        """Note that a parameter's bytes are written."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line((parameter, note)) + "\n")
        self.done[parameter] = note


def require_same(work: Path, fingerprint: str, name: str = NAME) -> None:
    """Refuse to go on with what a different run left; nothing of it is touched.

    Raises:
        Refused: the stopped run had another input, recipe or version.
    """
    path = work / name
    if not path.is_file():
        return
    first = (path.read_text(encoding="utf-8").splitlines() or ["{}"])[0]
    if _parsed(first).get("fingerprint") != fingerprint:
        raise Refused(
            f"{work} belongs to a run with another input, recipe or version", "run without --resume to start again"
        )


def _line(item: tuple[str, Any]) -> str:
    return json.dumps({"parameter": item[0], "note": item[1]})


def _parsed(line: str) -> dict[str, Any]:
    """A line of the journal; the last one may be cut off by a kill, and then it does not count."""
    try:
        plain = json.loads(line)
    except ValueError:
        return {}
    return plain if isinstance(plain, dict) else {}
