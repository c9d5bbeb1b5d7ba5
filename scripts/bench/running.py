"""The loop of a benchmark: rounds over rows, each measurement once, within the minutes that are given."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.measuring import Bench, Failed
from scripts.bench.rows import Row
from scripts.bench.store import Record, Store

PACKAGES = ("torch", "transformers")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Schedule:
    """Which measurements are made now.

    Attributes:
        rounds, long_rounds: of ordinary and of long rows.
        only: parts of keys or whole names of tools; empty means all.
        skip_long: long rows are left out.
        minutes: no measurement is begun that would not end by then.
        retry: failed ones are tried again.
        started: time.monotonic() of the beginning.
    """

    rounds: int
    long_rounds: int
    only: tuple[str, ...]
    skip_long: bool
    minutes: float
    retry: bool
    started: float

    def chosen(self, rows: Iterable[Row]) -> list[Row]:
        """The rows of this call."""
        asked = [row for row in rows if not (self.skip_long and row.long)]
        return [row for row in asked if not self.only or any(o == row.tool or o in row.key for o in self.only)]

    def rounds_of(self, row: Row) -> int:
        return self.long_rounds if row.long else self.rounds

    def fits(self, seconds: float) -> bool:
        """Whether something of this length ends in time."""
        return time.monotonic() - self.started + seconds <= 60 * self.minutes


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the loop."""
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="of outputs and of results.jsonl")
    parser.add_argument("--peers", type=Path, default=Path("build/bench-venv/bin/python"), help="python of the peers")
    parser.add_argument("--run", default="1", help="measurements under this name go on and are compared")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long-rounds", type=int, default=1, help="of rows that take minutes")
    parser.add_argument("--only", type=words, default=(), help="parts of row names, or tools: gptq,rtn,hqq")
    parser.add_argument("--parts", type=words, default=(), help="parts of the benchmark; none means all")
    parser.add_argument("--skip-long", action="store_true", help="leave out rows that take minutes")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing that would not end in this time")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of every process")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--keep", action="store_true", help="keep the outputs")
    parser.add_argument("--tables", action="store_true", help="measure nothing: print the tables of the run")
    parser.add_argument("--list", action="store_true", help="measure nothing: list rows, rounds and seconds")


def words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def started(given: argparse.Namespace) -> tuple[Bench, Schedule]:
    """What the options ask for."""
    store = Store(given.folder / "results.jsonl")
    bench = Bench(given.folder, given.peers, given.threads, store, given.run, given.keep)
    schedule = Schedule(
        given.rounds,
        given.long_rounds,
        given.only,
        given.skip_long,
        given.minutes,
        given.retry,
        time.monotonic(),
    )
    return bench, schedule


def environment(bench: Bench) -> dict[str, Any]:
    """The machine and the versions that decide seconds."""
    described = {"cpu": cpu(), "cores": os.cpu_count(), "threads": bench.threads, "python": platform.python_version()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {**described, **versions, **({"commit": commit.stdout.strip()} if commit.returncode == 0 else {})}


def cpu() -> str:
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run_rows(
    rows: Sequence[Row],
    bench: Bench,
    schedule: Schedule,
    measure: Callable[[Row], Figures],
    inputs: dict[str, Any],
) -> int:
    """Measure rows in rounds, A B C A B C, so that a machine that drifts drifts for all; returns what is left.

    Args:
        measure: figures of a row; raises Failed.
        inputs: what the figures depend on, for the store.
    """
    where = environment(bench)
    left = 0
    chosen = schedule.chosen(rows)
    for number in range(1, 1 + max(schedule.rounds, schedule.long_rounds)):
        for row in chosen:
            before = {(r.row, r.round): r for r in bench.store.records(bench.name)}
            known = before.get((row.key, number))
            if number > schedule.rounds_of(row) or (known and not (known.failed and schedule.retry)):
                continue
            if not schedule.fits(expected(row, before.values())):
                left += 1
                continue
            start = time.perf_counter()
            try:
                figures, failed = measure(row), ""
            except Failed as error:
                figures, failed = {}, str(error)
            figures["took"] = time.perf_counter() - start
            bench.store.add(Record(bench.name, row.key, number, figures, failed, where, inputs))
            say(row.key, number, figures, failed)
    return left


def expected(row: Row, records: Iterable[Record]) -> float:
    """Seconds that a measurement will take: as long as the longest before, or what its row says."""
    return max((r.figures["took"] for r in records if r.row == row.key and "took" in r.figures), default=row.seconds)


def say(key: str, number: int, figures: Figures, failed: str) -> None:
    """A line of progress on standard error."""
    told = {name: figures[name] for name in ("seconds", "kl", "took") if name in figures}
    text = failed or ", ".join(f"{name} {value:.4g}" for name, value in told.items())
    print(f"{key}, round {number}: {text}", file=sys.stderr, flush=True)


def listed(rows: Sequence[Row], bench: Bench, schedule: Schedule) -> str:
    """Rows with their rounds and seconds, as JSON lines."""
    records = bench.store.records(bench.name)
    return "\n".join(
        json.dumps({"row": row.key, "rounds": schedule.rounds_of(row), "seconds": round(expected(row, records))})
        for row in schedule.chosen(rows)
    )
