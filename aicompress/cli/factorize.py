"""`aicompress factorize`."""

from __future__ import annotations

from aicompress.cli import options as o
from aicompress.cli.step import Flags, run

EXAMPLES = """Examples:

aicompress factorize model/ smaller/ -r factorize/svd-keep

aicompress factorize mlp.safetensors small.safetensors -r factorize/svd-energy --set method.energy=0.95

`aicompress methods factorize` lists the methods and their parameters."""


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
    """Replace weight matrices by products of two smaller ones."""
    flags = Flags(dry_run, overwrite, resume, max_shard_size, latency.value, quiet, as_json, tuple(stats), allow_code)
    run("factorize", source, out, (recipe, overrides), flags)
