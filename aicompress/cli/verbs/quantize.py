"""`aicompress quantize`."""

from __future__ import annotations

from aicompress.cli.step import command_for

EXAMPLES = """Examples:

aicompress quantize model/ w4/ -r quantize/rtn-w4

aicompress quantize model/ w8/ -r quantize/rtn-w8 --dry-run

`aicompress methods quantize` lists the methods and their parameters."""


command = command_for("quantize", "Store weights in 8, 4, 3 or 2 bits.", "quantize/rtn-w8")
