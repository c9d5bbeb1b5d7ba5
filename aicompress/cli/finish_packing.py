"""What pack and unpack share: print the plan, or run it and print its report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aicompress.cli.boundary import STARTED
from aicompress.cli.progress import reporter
from aicompress.cli.step import Flags, conclude, report_path


def finish(planned: Any, flags: Flags, run: Callable[[Any, Any], Any]) -> None:
    """Print the plan of a dry run; otherwise run it and print its report."""
    from aicompress.pipeline.step.options import Options

    out, command = planned.destination.path, planned.recipe.method.name
    page = report_path(out)
    readable = page if planned.destination.single else page.with_name(f"{command}.{page.name}")
    options = Options(progress=reporter(flags.quiet), started=STARTED)
    conclude(planned, flags, lambda: run(planned, options), readable)
