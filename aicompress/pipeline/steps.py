"""Choose the driver of a method of factorize, quantize or prune.

A driver is imported when a method of its kind is asked for: a step does not wait for what the other kinds import.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aicompress.methods import get
from aicompress.methods.channels import ChannelMethod
from aicompress.methods.structural import StructuralMethod
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.step.input import Adapted
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import Recipe
from aicompress.report.model import Report

if TYPE_CHECKING:
    from aicompress.pipeline.channels.plan import ChannelPlan
    from aicompress.pipeline.layerwise.plan import Plan
    from aicompress.pipeline.structured.plan import StructurePlan

    Planned = Plan | StructurePlan | ChannelPlan


def make_plan(
    source: str | Path | Adapted, destination: Destination, recipe: Recipe, command: str, request: Request | None = None
) -> Planned:
    """Check everything that can be checked before the first byte is written.

    Raises:
        Refused: or Problems, when there are several.
    """
    plan, _ = _driver(get(command, recipe.method.name))
    planned: Planned = plan(source, destination, recipe, command, request or Request())
    return planned


def run(planned: Planned, options: Options | None = None) -> Report:
    """Write the output of a plan, its report inside."""
    step = planned.output.manifest.lineage[-1]
    _, carry_out = _driver(get(step["command"], planned.recipe.method.name))
    report: Report = carry_out(planned, options)
    return report


def _driver(method: object) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The functions that plan a step of a method's kind and that run the plan."""
    if isinstance(method, ChannelMethod):
        from aicompress.pipeline.channels import planner as channel_planner
        from aicompress.pipeline.channels import run as channels

        return channel_planner.make_plan, channels.run
    if isinstance(method, StructuralMethod):
        from aicompress.pipeline.structured import planner as structure_planner
        from aicompress.pipeline.structured import run as structured

        return structure_planner.make_plan, structured.run
    from aicompress.pipeline.layerwise import planner
    from aicompress.pipeline.layerwise import run as layerwise

    return planner.make_plan, layerwise.run
