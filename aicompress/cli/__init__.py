"""The command line. Nothing here imports torch before a command runs."""

from __future__ import annotations

from aicompress.cli import started  # noqa: F401  # notes the time


def main() -> None:
    """Entry point of the `aicompress` command."""
    from aicompress.cli.app import app
    from aicompress.cli.boundary import run

    run(app)
