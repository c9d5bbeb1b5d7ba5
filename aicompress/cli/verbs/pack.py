"""`aicompress pack`."""

from __future__ import annotations

from aicompress.cli import options as o
from aicompress.cli.step import Flags, conclude_packing, destination

EXAMPLES = """Examples:

aicompress pack model/ packed/

aicompress pack model.safetensors packed.safetensors

aicompress pack tuned/ packed/ --base model/"""


def command(
    source: o.Source,
    out: o.Out,
    base: o.Base = None,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Make any checkpoint smaller without changing a bit: what `unpack` gives back is the same to the byte."""
    from aicompress.cli.progress import reporter
    from aicompress.pipeline.packing import pack

    flags = Flags(dry_run, overwrite, quiet=quiet, as_json=as_json)
    planned = pack.make_plan(source, destination(out, flags), base)
    if dry_run:
        planned = pack.measured(planned, reporter(quiet))
    conclude_packing(planned, flags, pack.run)
