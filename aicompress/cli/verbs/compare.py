"""`aicompress compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """Examples:

aicompress compare w8/report.json w4/report.json w3/report.json"""


def command(
    reports: Annotated[
        list[Path], typer.Argument(metavar="REPORT...", help="report.json files, or checkpoints that hold one.")
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with a Pareto plot.")
    ] = None,
) -> None:
    """Put reports side by side: bytes, quality, latency; the best trade-offs are marked."""
    from aicompress.cli.reading import compare_reports

    compare_reports(reports, markdown, html)
