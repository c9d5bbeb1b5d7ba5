"""`aicompress eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aicompress.cli import options as o

EXAMPLES = """Examples:

aicompress eval w4/ --against model/ -r eval/language-model -o w4/eval

aicompress eval w4/ --against model/ -r eval/sentence-encoder --fail-if 'size.ratio > 0.3'

aicompress eval w4/ --against model/ --against-adapter lora/ -r eval/language-model --text heldout.txt"""

BaselineAdapters = Annotated[
    list[str],
    typer.Option(
        "--against-adapter",
        metavar="DIR[:WEIGHT]",
        help="An adapter that is merged into every baseline. Repeatable.",
        rich_help_panel=o.STEP,
        show_default=False,
    ),
]


def command(
    source: o.Source,
    recipe: o.RecipeName = None,
    against: Annotated[
        list[str],
        typer.Option(
            "--against",
            "-a",
            metavar="BASE",
            help="A baseline, usually the original. Repeatable.",
            rich_help_panel=o.STEP,
            show_default=False,
        ),
    ] = [],  # noqa: B006
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Write report.json, report.md and report.html here.",
            rich_help_panel=o.RUN,
        ),
    ] = None,
    overrides: o.Overrides = [],  # noqa: B006
    text: o.Text = None,
    adapter: o.Adapters = [],  # noqa: B006
    against_adapter: BaselineAdapters = [],  # noqa: B006
    fail_if: Annotated[
        list[str],
        typer.Option(
            "--fail-if",
            metavar="EXPR",
            help="Exit with 3 if this holds, e.g. 'quality.kl > 0.05'. Repeatable.",
            rich_help_panel=o.STEP,
            show_default=False,
        ),
    ] = [],  # noqa: B006
    device: o.DeviceName = o.Device.auto,
    allow_code: o.AllowCode = False,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Measure a checkpoint: bytes, load time, memory, latency, and quality on held-out data."""
    from aicompress.cli.measuring import run
    from aicompress.cli.step import adapted, chosen, with_data
    from aicompress.errors import Refused

    if against_adapter and not against:
        raise Refused("--against-adapter is merged into baselines, and there is none", "give --against BASE")
    edits = with_data(overrides, text)
    run(
        adapted(source, adapter),
        [adapted(base, against_adapter) for base in against],
        (chosen(recipe, "eval/size-and-speed"), edits),
        (out, fail_if),
        (device.value, allow_code, quiet, as_json),
    )
