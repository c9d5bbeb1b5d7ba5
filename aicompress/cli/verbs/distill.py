"""`aicompress distill`."""

from __future__ import annotations

from typing import Annotated

import typer

from aicompress.cli import options as o
from aicompress.cli.step import Flags, chosen, with_data

EXAMPLES = """Examples:

aicompress distill pruned/ healed/ --teacher model/ -r distill/embedding
aicompress distill model/ smaller/ -r distill/student-layers

`aicompress methods distill` lists the losses and their parameters."""


def command(
    source: o.Source,
    out: o.Out,
    teacher: Annotated[
        list[str],
        typer.Option(
            "--teacher",
            "-t",
            metavar="TEACHER",
            help="The checkpoint to learn from. Repeatable: several are averaged. IN, if left out, where the recipe "
            "makes the student out of IN.",
            rich_help_panel=o.STEP,
            show_default=False,
        ),
    ] = [],  # noqa: B006
    recipe: o.RecipeName = None,
    overrides: o.Overrides = [],  # noqa: B006
    text: o.Text = None,
    adapter: o.Adapters = [],  # noqa: B006
    cache_teacher: o.StoredTeacher = None,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    max_shard_size: o.ShardSize = None,
    latency: o.LatencyMode = o.LatencyChoice.auto,
    device: o.DeviceName = o.Device.auto,
    stats: o.Movement = None,
    log_dir: o.LogFolder = None,
    allow_code: o.AllowCode = False,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Train a student, IN or what the recipe makes of IN, to do what a teacher does; IN may be any step's output."""
    from aicompress.cli.training import run

    kept = () if stats is None else (stats,)
    flags = Flags(dry_run, overwrite, resume, max_shard_size, latency.value, quiet, as_json, kept, allow_code)
    asked = (chosen(recipe, "distill/kl"), with_data(overrides, text))
    run((source, adapter), (teacher, cache_teacher), out, asked, flags, (device.value, log_dir))
