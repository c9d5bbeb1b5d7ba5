"""The application: one file of `verbs/` per command, listed here in the order of the help text."""

from __future__ import annotations

from typing import Annotated

import typer

from aicompress import __version__
from aicompress.cli.boundary import guarded
from aicompress.cli.verbs import (
    compare,
    distill,
    evaluate,
    export,
    factorize,
    inspect,
    methods,
    pack,
    prune,
    quantize,
    schema,
    unpack,
    verify,
)

app = typer.Typer(
    name="aicompress",
    help="Compress saved neural-network checkpoints: safetensors in, smaller safetensors and a report out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 refused (usage, recipe, input), 3 a gate failed, 130 interrupted, "
    "143 terminated.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aicompress {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Options before the command."""


_STEPS, _READ = "Steps: checkpoint in, checkpoint out", "Reading"
for name, module, panel in (
    ("factorize", factorize, _STEPS),
    ("quantize", quantize, _STEPS),
    ("prune", prune, _STEPS),
    ("distill", distill, _STEPS),
    ("export", export, _STEPS),
    ("pack", pack, _STEPS),
    ("unpack", unpack, _STEPS),
    ("eval", evaluate, _STEPS),
    ("inspect", inspect, _READ),
    ("verify", verify, _READ),
    ("compare", compare, _READ),
    ("methods", methods, _READ),
    ("schema", schema, _READ),
):
    app.command(name, rich_help_panel=panel, epilog=module.EXAMPLES)(guarded(module.command))
