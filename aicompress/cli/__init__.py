"""The command line. Nothing here imports torch before a command runs."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `aicompress` command."""
    from aicompress.cli import boundary  # first: it notes the time, and imports are part of what a user waits for

    boundary.pause_collector()
    from aicompress.cli.app import app

    boundary.run(app)
