"""`aicompress inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from aicompress.cli import options as o

EXAMPLES = """Examples:

aicompress inspect model/

aicompress inspect w4/ --json"""


def command(
    source: o.Source,
    analyze: Annotated[
        bool, typer.Option("--analyze", help="Read the weights: range and distribution of each layer.")
    ] = False,
    as_json: o.AsJson = False,
) -> None:
    """Show what a checkpoint holds: layers, forms, bytes, and the steps that made it."""
    from aicompress.cli.reading import show_inspection

    show_inspection(source, analyze, as_json)
