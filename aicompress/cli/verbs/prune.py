"""`aicompress prune`."""

from __future__ import annotations

from aicompress.cli.step import command_for

EXAMPLES = """Examples:

aicompress prune model/ half/ -r prune/magnitude-50

aicompress prune model/ shallow/ -r prune/depth-half

`aicompress methods prune` lists the methods and their parameters."""


command = command_for("prune", "Remove weights, neurons or whole layers.", "prune/magnitude-50")
