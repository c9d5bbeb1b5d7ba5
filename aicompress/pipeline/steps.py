"""Choose the driver of a method of factorize, quantize or prune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aicompress.methods import get
from aicompress.methods.structural import ChannelMethod, StructuralMethod
from aicompress.pipeline.calibration.requirements import Request
from aicompress.pipeline.channels import plan as channel_plan
from aicompress.pipeline.channels import run as channels
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.structured import plan as structure_plan
from aicompress.pipeline.structured import run as structured
from aicompress.recipe import Recipe
from aicompress.report.model import Report

Planned = Plan | structure_plan.StructurePlan | channel_plan.ChannelPlan


def make_plan(
    source: str | Path, destination: Destination, recipe: Recipe, command: str, request: Request | None = None
) -> Planned:
    """Plan a step: check everything that can be checked before the first byte is written.

    Raises:
        Refused: or Problems, when there are several.
    """
    method: Any = get(command, recipe.method.name)
    request = request or Request()
    if isinstance(method, ChannelMethod):
        return channel_plan.make_plan(source, destination, recipe, command, request)
    if isinstance(method, StructuralMethod):
        return structure_plan.make_plan(source, destination, recipe, command, request)
    return planner.make_plan(source, destination, recipe, command, request)


def run(planned: Planned, options: Options | None = None) -> Report:
    """Write the output of a plan, its report inside."""
    if isinstance(planned, channel_plan.ChannelPlan):
        return channels.run(planned, options)
    if isinstance(planned, structure_plan.StructurePlan):
        return structured.run(planned, options)
    return layerwise.run(planned, options)
