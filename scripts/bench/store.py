"""Measurements as JSON lines: each is appended when it is made, so that a run can be cut and go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        run: name of the run; only records of one run are compared.
        row: key of the row.
        round: which of the run's rounds, from 1.
        figures: by name: seconds, wall, peak_rss, bytes, kl, ...
        failed: why there are no figures.
        environment: machine, threads, versions.
        inputs: what was compressed and judged on.
    """

    run: str
    row: str
    round: int
    figures: dict[str, Any] = field(default_factory=dict)
    failed: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)


class Store:
    """A file of records."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self, run: str = "") -> list[Record]:
        """Records of a run, or of all; of a measurement made again the last. A line cut short is left out."""
        found: dict[tuple[str, str, int], Record] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        for line in lines:
            try:
                record = Record(**json.loads(line))
            except (ValueError, TypeError):
                continue
            if run in ("", record.run):
                found[record.run, record.row, record.round] = record
        return list(found.values())

    def add(self, record: Record) -> None:
        """Append a record, on a line of its own even after one that was cut short."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self.path.is_file() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut else "") + json.dumps(asdict(record), ensure_ascii=False) + "\n")

    def quality(self, digest: str, inputs: dict[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
        """Quality that was measured of the same weights on the same inputs: it needs no second evaluation."""
        for record in self.records():
            same = record.figures.get("digest") == digest and record.inputs == inputs
            if same and all(name in record.figures for name in names):
                return {name: record.figures[name] for name in names}
        return None
