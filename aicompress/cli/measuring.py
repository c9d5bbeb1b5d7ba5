"""Run `eval` and print its report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(
    source: Any,
    against: Sequence[Any],
    recipe: tuple[str, list[str]],
    judged: tuple[Path | None, list[str]],
    flags: tuple[str, bool, bool, bool],
) -> None:
    """Measure, print the report, and fail where a gate does not hold; IN and baselines come with their adapters."""
    from aicompress.cli import render
    from aicompress.cli.boundary import STARTED, resume_collector
    from aicompress.cli.progress import reporter
    from aicompress.cli.step import report_path
    from aicompress.pipeline.evaluation.run import EvalOptions, evaluate
    from aicompress.pipeline.step.options import Options
    from aicompress.recipe.evaluation import load
    from aicompress.report.gates import require

    out, fail_if = judged
    device, allow_code, quiet, as_json = flags
    judging = EvalOptions(out, tuple(fail_if), allow_code)
    options = Options(device=device, progress=reporter(quiet), started=STARTED)
    loaded = load(recipe[0], recipe[1])
    resume_collector()
    report = evaluate(source, against, loaded, judging, options)
    try:
        if as_json:
            print(report.to_json(), end="")
        elif not quiet:
            render.report(report)
            if out is not None:
                print(f"\nreport: {report_path(out, loaded.report.html)}")
        sys.stdout.flush()
    finally:
        require(report.gates)  # also where nobody could read the report
