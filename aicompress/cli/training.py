"""What distill runs and prints."""

from __future__ import annotations

from pathlib import Path

from aicompress.cli.progress import reporter
from aicompress.cli.step import Flags, conclude, destination


def run(
    source: str, teacher: str, out: Path, recipe: tuple[str, list[str]], flags: Flags, running: tuple[str, bool]
) -> None:
    """Plan a distillation and print the plan, or run it and print its report."""
    from aicompress.pipeline.distillation import driver as distill
    from aicompress.recipe.distillation import load

    device, allow_code = running
    planned = distill.make_plan(source, teacher, destination(out, flags), load(recipe[0], recipe[1]), allow_code)
    options = distill.Options(flags.resume, flags.latency, reporter(flags.quiet), device=device)
    conclude(planned, flags, lambda: distill.run(planned, options))
