"""`aicompress compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aicompress.errors import CompressError, OutputExists, Refused

if TYPE_CHECKING:
    from aicompress.report.model import Report

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
    from aicompress.cli import render
    from aicompress.disk import require_file, write_whole
    from aicompress.report import compare
    from aicompress.report.html import comparison_to_html

    if html is not None:
        require_file(html)
    compared = compare.comparison([_report(path) for path in reports])
    if html is not None:
        _require_own_page(html)
        write_whole({html: comparison_to_html(compared)})
    if markdown:
        print(compare.to_markdown(compared))
        return
    render.table(compare.table(compared))
    for line in (compare.legend(compared), *compared.notes):
        if line:
            print(line)


def _require_own_page(path: Path) -> None:
    """Refuse to replace a file that is no page of a comparison.

    Raises:
        OutputExists: it is another one.
    """
    if path.is_file() and b"<title>Comparison of " not in path.read_bytes()[:1000]:
        raise OutputExists(f"aicompress did not write {path}", "nothing else is ever replaced: choose another FILE")


def _report_in(folder: Path) -> Path:
    """The report of what made a folder: a packed one holds that of its input as well."""
    names = ("pack.report.json", "report.json", "unpack.report.json")
    return next((folder / name for name in names if (folder / name).is_file()), folder / "report.json")


def _report(path: Path) -> Report:
    from aicompress.disk import report_path
    from aicompress.report.model import Report

    file = _report_in(path) if path.is_dir() else path
    if file.suffix == ".safetensors":
        file = report_path(file)
    try:
        return Report.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise Refused(
            f"{file} cannot be read: {reason}", "name a report.json, or a checkpoint that holds one"
        ) from error
    except CompressError as error:
        raise Refused(f"{file}: {error.message}", error.hint) from error
