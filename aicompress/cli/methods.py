"""`aicompress methods`."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLES = """Examples:

aicompress methods

aicompress methods quantize"""


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="[COMMAND]", help="factorize, quantize, prune or distill.")
    ] = None,
) -> None:
    """List the methods of each command, or one command's methods with their parameters."""
    from aicompress.cli import render
    from aicompress.errors import Refused, suggestion
    from aicompress.methods.registry import COMMANDS, methods
    from aicompress.report.table import Table

    if name is not None and name not in COMMANDS:
        raise Refused(f"there is no command {name!r}", suggestion(name, COMMANDS))
    if name is None:
        rows = [(command, m.name, m.summary) for command in COMMANDS for m in methods(command).values()]
        render.table(Table.of("", ("command", "method", "what it does"), rows))
        return
    for method in methods(name).values():
        parameters = [
            (
                field,
                _type(info.annotation),
                "required" if info.is_required() else repr(info.default),
                info.description or "",
            )
            for field, info in method.config.model_fields.items()
            if field != "name"
        ]
        render.table(
            Table.of(f"{method.name}: {method.summary}", ("parameter", "type", "default", "meaning"), parameters)
        )
        presets = [(level, effort.cost) for level, effort in method.efforts.items()]
        if presets:
            render.table(Table.of(f"{method.name}: presets", ("effort", "cost"), presets))


def _type(annotation: object) -> str:
    """A parameter's type as a reader would say it."""
    shown = getattr(annotation, "__name__", None) if not hasattr(annotation, "__args__") else None
    return shown or str(annotation).replace("typing.", "").removeprefix("Literal")
