"""The command line. Nothing here imports torch before a command runs."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `aicompress` command."""
    from aicompress.cli.boundary import run  # first: it notes the time, and imports are part of what a user waits for

    from aicompress.cli.app import app  # isort: skip

    run(app)
