"""What factorize, quantize and prune share: plan, print or run, render."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aicompress.cli import options as o
from aicompress.cli.boundary import STARTED, resume_collector
from aicompress.cli.progress import reporter
from aicompress.errors import Refused
from aicompress.pipeline.step.options import Mode

if TYPE_CHECKING:
    from aicompress.report.model import Report


@dataclass(frozen=True)
class Flags:
    """Flags of a step, as given."""

    dry_run: bool = False
    overwrite: bool = False
    resume: bool = False
    max_shard_size: str | None = None
    latency: Mode = "auto"
    quiet: bool = False
    as_json: bool = False


def command_for(name: str, summary: str, default: str | None = None) -> Callable[..., None]:
    """The command line function of factorize, quantize or prune: they differ in their methods only.

    Args:
        default: the shipped recipe that is taken where none is given.
    """

    def command(
        source: o.Source,
        out: o.Out,
        recipe: o.RecipeName = None,
        overrides: o.Overrides = [],  # noqa: B006
        text: o.Text = None,
        drawn: o.Drawn = None,
        adapter: o.Adapters = [],  # noqa: B006
        effort: o.EffortName = None,
        dry_run: o.DryRun = False,
        overwrite: o.Overwrite = False,
        resume: o.Resume = False,
        max_shard_size: o.ShardSize = None,
        latency: o.LatencyMode = "auto",
        stats: o.Stats = [],  # noqa: B006
        allow_code: o.AllowCode = False,
        quiet: o.Quiet = False,
        as_json: o.AsJson = False,
    ) -> None:
        from aicompress import recipe as recipes
        from aicompress.pipeline import steps
        from aicompress.pipeline.calibration.request import Request
        from aicompress.pipeline.step.options import Options
        from aicompress.pipeline.step.survey import Survey
        from aicompress.pipeline.step.workers import is_first

        flags = Flags(dry_run, overwrite, resume, max_shard_size, latency, quiet, as_json)
        preset = [] if effort is None else [f"effort={effort}"]
        loaded = recipes.load(chosen(recipe, default), name, [*with_data(overrides, text, drawn), *preset])
        survey = Survey(keep=dry_run, progress=reporter(quiet or not is_first()))
        request = Request(allow_code, tuple(stats), survey)
        planned = steps.make_plan(adapted(source, adapter), destination(out, flags), loaded, name, request)
        options = Options(resume, latency, reporter(quiet or not is_first()), started=STARTED)
        conclude(planned, flags, lambda: steps.run(planned, options))

    command.__doc__ = summary
    return command


def chosen(recipe: str | None, default: str | None) -> str:
    """The recipe that was given, or the default, which is named on standard error.

    Raises:
        Refused: there is none.
    """
    if recipe is not None:
        return recipe
    if default is None:
        raise Refused("no recipe is given", "give -r RECIPE")
    print(f"recipe: {default}, as none was given", file=sys.stderr)
    return default


def with_data(overrides: Sequence[str], text: Path | None, drawn: int | None = None) -> list[str]:
    """The edits of a recipe with those of --drawn and --text, before those of --set."""
    edits = [f"{name}={value}" for name, value in (("drawn", drawn), ("text", text)) if value is not None]
    return [*edits, *overrides]


def adapted(source: str, adapters: Sequence[str]) -> Any:
    """The input with adapters as the command line names them, DIR or DIR:WEIGHT.

    Raises:
        Refused: a weight that is no finite number.
    """
    from aicompress.pipeline.step.input import Adapted

    return Adapted(source, tuple(_adapter(each) for each in adapters))


def _adapter(given: str) -> tuple[str, float]:
    folder, colon, weight = given.rpartition(":")
    if not colon or weight.startswith("//") or Path(given).exists():
        return given, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise Refused(f"--adapter {given}: {weight!r} is no weight", "write DIR, or DIR:0.5")
    return folder, number


def destination(out: Path, flags: Flags) -> Any:
    """Where the output goes."""
    from aicompress.pipeline.step.output import Destination
    from aicompress.report.numbers import parse_bytes

    return Destination(out, parse_bytes(flags.max_shard_size) if flags.max_shard_size else None, flags.overwrite)


def conclude(planned: Any, flags: Flags, execute: Any, readable: Path | None = None) -> None:
    """Print the plan of a dry run; otherwise run it, print its report and judge its gates.

    Args:
        planned: the plan.
        flags: as given.
        execute: runs it, and gives the report.
        readable: the report's page; None where it has the usual name.
    """
    from aicompress.cli import render
    from aicompress.pipeline.step.workers import is_first

    if flags.dry_run:
        if flags.as_json:
            print(planned.summary().to_json())
        else:
            render.plan(planned.summary())
        return
    resume_collector()
    report = execute()
    if is_first():
        page = readable or readable_report(planned.output.destination.path, planned.recipe.report.html)
        show(report, flags.quiet, flags.as_json, page)


def conclude_packing(planned: Any, flags: Flags, run: Callable[[Any, Any], Any]) -> None:
    """The same of pack and unpack, whose report in a folder is named after the command."""
    from aicompress.pipeline.step.options import Options

    page = readable_report(planned.destination.path)
    readable = page if planned.destination.single else page.with_name(f"{planned.recipe.method.name}.{page.name}")
    options = Options(progress=reporter(flags.quiet), started=STARTED)
    conclude(planned, flags, lambda: run(planned, options), readable)


def show(report: Report, quiet: bool, as_json: bool, page: Path | None) -> None:
    """Print a report, and where its readable page lies, and judge its gates."""
    from aicompress.cli import render
    from aicompress.report.gates import require

    try:
        if as_json:
            print(report.to_json(), end="")
        elif not quiet:
            render.report(report)
            if page is not None:
                print(f"\nreport: {page}")
        sys.stdout.flush()
    finally:
        require(report.gates)  # also where nobody could read the report


def readable_report(out: Path, html: bool = True) -> Path:
    """The readable report of an output: the page, or the Markdown file where a recipe asks for no page."""
    from aicompress.disk import report_path

    return report_path(out, "report.html" if html else "report.md")
