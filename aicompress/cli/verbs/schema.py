"""`aicompress schema`."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLES = """Examples:

aicompress schema quantize > quantize.schema.json"""


def command(
    name: Annotated[str, typer.Argument(metavar="COMMAND", help="factorize, quantize, prune, distill or eval.")],
) -> None:
    """Print the JSON schema of a command's recipe, for editors that complete and check YAML."""
    import json

    from aicompress.recipe.schema import schema

    print(json.dumps(schema(name), indent=2))
