"""`aicompress verify`."""

from __future__ import annotations

from aicompress.cli import options as o

EXAMPLES = """Examples:

aicompress verify w4/"""


def command(source: o.Source, as_json: o.AsJson = False) -> None:
    """Check that a checkpoint is complete: headers, index, digests, finite values, every compressed weight decodes."""
    from aicompress.cli.reading import show_verification

    show_verification(source, as_json)
