"""`aicompress quantize`."""

from __future__ import annotations

from aicompress.cli import options as o
from aicompress.cli.step import Flags, run

EXAMPLES = """Examples:

aicompress quantize model/ w4/ -r quantize/rtn-w4

aicompress quantize model/ w8/ -r quantize/rtn-w8 --dry-run

`aicompress methods quantize` lists the methods and their parameters."""


def command(
    source: o.Source,
    out: o.Out,
    recipe: o.RecipeName,
    overrides: o.Overrides = [],  # noqa: B006
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    max_shard_size: o.ShardSize = None,
    latency: o.LatencyMode = o.Latency.auto,
    stats: o.Stats = [],  # noqa: B006
    allow_code: o.AllowCode = False,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Store weights in 8, 4, 3 or 2 bits."""
    flags = Flags(dry_run, overwrite, resume, max_shard_size, latency.value, quiet, as_json, tuple(stats), allow_code)
    run("quantize", source, out, (recipe, overrides), flags)
