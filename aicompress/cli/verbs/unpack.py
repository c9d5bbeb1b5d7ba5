"""`aicompress unpack`."""

from __future__ import annotations

from aicompress.cli import options as o
from aicompress.cli.step import Flags, conclude_packing, destination

EXAMPLES = """Examples:

aicompress unpack packed/ model/

aicompress unpack packed/ tuned/ --base model/"""


def command(
    source: o.Source,
    out: o.Out,
    base: o.Base = None,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Give back what `pack` was given, to the byte; its digest is checked."""
    from aicompress.pipeline.packing import unpack

    flags = Flags(dry_run, overwrite, quiet=quiet, as_json=as_json)
    conclude_packing(unpack.make_plan(source, destination(out, flags), base), flags, unpack.run)
