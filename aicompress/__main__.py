"""`python -m aicompress` is the `aicompress` command."""

from aicompress.cli import main

main()
