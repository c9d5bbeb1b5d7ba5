"""Try the commands on every model type that transformers can build small.

    python -m scripts.sweep --minutes 30
    python -m scripts.sweep --table

Each type has a process of its own, forked from one that has imported everything, with a time limit: neither a crash nor
a loop in one ends the sweep. Outcomes are appended to outcomes.jsonl, and a type that has all of its own is not tried
again. Types come in an order that is drawn once, so that a part of the sweep stands for all of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from scripts.sweep.configs import model_types
from scripts.sweep.table import markdown, read
from scripts.sweep.trial import FAULT, STEPS, WORKS, Outcome, trials

SECONDS = 240  # of wall time that one type may take
ENDED = "the process ended"  # how the reason of a fault ends behind which no step was tried


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.sweep", description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build/sweep"), help="of outcomes.jsonl and table.md")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no type after this time")
    parser.add_argument("--types", nargs="*", default=None, help="model types; none means all")
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=list(STEPS), help="steps that are tried")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="wall time that one type may take")
    parser.add_argument("--again", action="store_true", help="try types again of which a step was a fault")
    parser.add_argument("--table", action="store_true", help="try nothing: write the table")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parsed(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    log = given.folder / "outcomes.jsonl"
    if not given.table:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:  # imports everything that the processes then share
            list(trials("llama", tuple(given.steps), Path(folder)))
        gc.collect()
        gc.freeze()
        _sweep(given, log)
    text = markdown(read(log), len(model_types()))
    (given.folder / "table.md").write_text(text)
    print(text)
    return 0


def _sweep(given: argparse.Namespace, log: Path) -> None:
    """Try one type after the other until the minutes are over."""
    end = time.monotonic() + 60 * given.minutes
    outcomes = read(log)
    known = over(outcomes, given.steps)
    if given.again:
        known -= {outcome.model_type for outcome in outcomes if outcome.verdict == FAULT}
    order = model_types()
    random.Random(0).shuffle(order)
    for model_type in given.types or [each for each in order if each not in known]:
        if time.monotonic() > end:
            break
        tried(model_type, tuple(given.steps), log, given.seconds)


def over(outcomes: Sequence[Outcome], wanted: Sequence[str]) -> set[str]:
    """Types of which nothing is left to try: a sweep that was stopped had begun with one of them, maybe."""
    steps: dict[str, set[str]] = {}
    for outcome in outcomes:
        steps.setdefault(outcome.model_type, set()).add(outcome.step)
    whole = {model_type for model_type, done in steps.items() if {"build", *wanted} <= done}
    ended = {outcome.model_type for outcome in outcomes if outcome.verdict == FAULT and outcome.reason.endswith(ENDED)}
    unbuilt = {outcome.model_type for outcome in outcomes if outcome.step == "build" and outcome.verdict != WORKS}
    return whole | ended | unbuilt


def tried(model_type: str, wanted: tuple[str, ...], log: Path, seconds: float) -> None:
    """Try a type in a process of its own, which is ended after some seconds; the log has what came of it."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        os._exit(_child(model_type, wanted, log))
    end = time.monotonic() + seconds
    status = 0
    while not os.waitpid(process, os.WNOHANG)[0]:
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
            status = os.waitpid(process, 0)[1]
            break
        time.sleep(0.02)
    done = [outcome.step for outcome in read(log) if outcome.model_type == model_type]
    left = next((step for step in ("build", *wanted) if step not in done), None)
    if "build" not in done or (left is not None and _built(log, model_type)):
        reason = f"after {seconds:.0f} s {ENDED}" if status else ENDED
        _append(log, Outcome(model_type, left or "build", FAULT, reason))


def _built(log: Path, model_type: str) -> bool:
    """Whether the type has a model that steps can be tried on."""
    return any(
        outcome.model_type == model_type and outcome.model for outcome in read(log) if outcome.verdict == "works"
    )


def _child(model_type: str, wanted: tuple[str, ...], log: Path) -> int:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    folder = Path(tempfile.mkdtemp(prefix="sweep-", dir=log.parent))
    try:
        for outcome in trials(model_type, wanted, folder):
            _append(log, outcome)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _append(log: Path, outcome: Outcome) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(outcome.as_row()) + "\n")


if __name__ == "__main__":
    sys.exit(main())
