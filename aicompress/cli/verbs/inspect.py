"""`aicompress inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from aicompress.cli import options as o

EXAMPLES = """Examples:

aicompress inspect model/

aicompress inspect w4/ --json

aicompress inspect model/ --analyze --group-size 128 --max-error 0.05"""


def command(
    source: o.Source,
    analyze: Annotated[
        bool, typer.Option("--analyze", help="Read the weights: distribution, rounding errors, proposed bits by layer.")
    ] = False,
    group_size: Annotated[
        int, typer.Option("--group-size", min=1, help="--analyze: columns that share a scale when layers are rounded.")
    ] = 64,
    max_error: Annotated[
        float, typer.Option("--max-error", min=0, help="--analyze: relative error that the proposed bits keep.")
    ] = 0.12,
    as_json: o.AsJson = False,
) -> None:
    """Show what a checkpoint holds: layers, forms, bytes, and the steps that made it."""
    from aicompress.cli.reading import show_inspection

    show_inspection(source, as_json, (group_size, max_error) if analyze else None)
