"""`aicompress eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from aicompress.cli import options as o

EXAMPLES = """Examples:

aicompress eval w4/ --against model/ -r eval/language-model -o w4/eval

aicompress eval w4/ --against model/ -r eval/sentence-encoder --fail-if 'size.ratio > 0.3'

aicompress eval w4/ --against model/ --against-adapter lora/ -r eval/language-model --text heldout.txt"""

BaselineAdapters = Annotated[
    list[str],
    o.to_do(
        "--against-adapter",
        metavar="DIR[:WEIGHT]",
        help="An adapter that is merged into every baseline. Repeatable.",
    ),
]


def command(
    source: o.Source,
    recipe: o.RecipeName = None,
    against: Annotated[
        list[str],
        o.to_do(
            "--against",
            "-a",
            metavar="BASE",
            help="A baseline, usually the original. Repeatable.",
        ),
    ] = [],  # noqa: B006
    out: Annotated[
        Path | None,
        o.where(
            "--out",
            "-o",
            metavar="DIR",
            help="Write report.json, report.md and report.html here.",
        ),
    ] = None,
    overrides: o.Overrides = [],  # noqa: B006
    text: o.Text = None,
    adapter: o.Adapters = [],  # noqa: B006
    against_adapter: BaselineAdapters = [],  # noqa: B006
    fail_if: Annotated[
        list[str],
        o.to_do(
            "--fail-if",
            metavar="EXPR",
            help="Exit with 3 if this holds, e.g. 'quality.kl > 0.05'. Repeatable.",
        ),
    ] = [],  # noqa: B006
    device: o.DeviceName = "auto",
    allow_code: o.AllowCode = False,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Measure a checkpoint: bytes, load time, memory, latency, and quality on held-out data."""
    from aicompress.cli.boundary import STARTED, resume_collector
    from aicompress.cli.progress import reporter
    from aicompress.cli.step import adapted, chosen, readable_report, show, with_data
    from aicompress.errors import Refused
    from aicompress.pipeline.evaluation.run import EvalOptions, evaluate
    from aicompress.pipeline.step.options import Options
    from aicompress.recipe.evaluation import load

    if against_adapter and not against:
        raise Refused("--against-adapter is merged into baselines, and there is none", "give --against BASE")
    edits = with_data(overrides, text)
    given, baselines = adapted(source, adapter), [adapted(base, against_adapter) for base in against]
    options = Options(device=device, progress=reporter(quiet), started=STARTED)
    loaded = load(chosen(recipe, "eval/size-and-speed"), edits)
    resume_collector()
    report = evaluate(given, baselines, loaded, EvalOptions(out, tuple(fail_if), allow_code), options)
    show(report, quiet, as_json, None if out is None else readable_report(out, loaded.report.html))
