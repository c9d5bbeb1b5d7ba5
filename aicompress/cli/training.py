"""Run `distill` and print its report."""

from __future__ import annotations

from pathlib import Path

from aicompress.cli.progress import reporter
from aicompress.cli.step import Flags, conclude, destination


def run(source: str, teacher: str, out: Path, recipe: tuple[str, list[str]], flags: Flags, device: str) -> None:
    """Plan a distillation and print the plan, or run it and print its report."""
    from aicompress.pipeline.distillation import run as distill
    from aicompress.recipe.distillation import load

    loaded = load(recipe[0], recipe[1])
    planned = distill.make_plan(source, teacher, destination(out, flags), loaded, flags.allow_code)
    stats = flags.stats[0] if flags.stats else None
    options = distill.Options(flags.resume, flags.latency, reporter(flags.quiet), device=device, stats=stats)
    conclude(planned, flags, lambda: distill.run(planned, options))
