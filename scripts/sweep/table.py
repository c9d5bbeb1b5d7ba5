"""The outcomes of a sweep as a Markdown table: works, refused with the reason, and faults by name."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from scripts.sweep.trial import ABSENT, FAULT, REFUSED, STEPS, WORKS, Outcome

SHOWN = 3  # types that are named for a reason


def read(log: Path) -> list[Outcome]:
    """The last outcome of every step on every type."""
    last: dict[tuple[str, str], Outcome] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        outcome = Outcome(**json.loads(line))
        if outcome.step == "build":
            last = {key: value for key, value in last.items() if key[0] != outcome.model_type}
        last[outcome.model_type, outcome.step] = outcome
    return list(last.values())


def markdown(outcomes: Sequence[Outcome], known: int) -> str:
    """Counts by step, then every reason with the types that it was given for."""
    built = [outcome for outcome in outcomes if outcome.step == "build"]
    seconds = sum(outcome.seconds for outcome in outcomes)
    lines = [
        f"{len(built)} of {known} model types tried, {sum(o.verdict == WORKS for o in built)} built small; "
        f"{seconds / 60:.0f} minutes of one processor.",
        "",
        "| step | works | refused | fault |",
        "|---|---:|---:|---:|",
    ]
    for step in STEPS:
        counts = Counter(outcome.verdict for outcome in outcomes if outcome.step == step)
        lines.append(f"| {step} | {counts[WORKS]} | {counts[REFUSED]} | {counts[FAULT]} |")
    for verdict in (FAULT, REFUSED, ABSENT):
        chosen = [outcome for outcome in outcomes if outcome.verdict == verdict]
        if chosen:
            lines += ["", f"| step | {verdict}: why | types |", "|---|---|---|", *_reasons(chosen, verdict == FAULT)]
    return "\n".join(lines) + "\n"


def _reasons(outcomes: Sequence[Outcome], all_named: bool) -> list[str]:
    """A row for every step and reason, the most frequent first; numbers and names in a reason are left out."""
    types: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        types.setdefault((outcome.step, _kind(outcome.reason)), []).append(outcome.model_type)
    rows = sorted(types.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        f"| {step} | {reason.replace('|', '/')} | {len(names)}: {', '.join(names if all_named else names[:SHOWN])} |"
        for (step, reason), names in rows
    ]


def _kind(reason: str) -> str:
    plain = re.sub(r"/\S+/sweep-\w+/", "", reason)
    plain = re.sub(r"\b[\w-]+(\.[\w#-]+){2,}\b", "TENSOR", plain)
    return re.sub(r"\d[\d,]*", "N", plain)[:160]
