"""`aicompress factorize`."""

from __future__ import annotations

from aicompress.cli.step import command_for

EXAMPLES = """Examples:

aicompress factorize model/ smaller/ -r factorize/svd-keep

aicompress factorize mlp.safetensors small.safetensors -r factorize/svd-energy --set method.energy=0.95

`aicompress methods factorize` lists the methods and their parameters."""


command = command_for("factorize", "Replace weight matrices by products of two smaller ones.", "factorize/svd-keep")
