"""`aicompress prune`."""

from __future__ import annotations

from aicompress.cli import options as o
from aicompress.cli.step import Flags, run

EXAMPLES = """Examples:

aicompress prune model/ half/ -r prune/magnitude-50

aicompress prune model/ shallow/ -r prune/depth-even --set method.keep_layers=4

`aicompress methods prune` lists the methods and their parameters."""


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
    """Remove weights, neurons or whole layers."""
    flags = Flags(dry_run, overwrite, resume, max_shard_size, latency.value, quiet, as_json, tuple(stats), allow_code)
    run("prune", source, out, (recipe, overrides), flags)
