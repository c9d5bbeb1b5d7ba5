"""Apply a method to the layers of one parameter, or to several layers that share their inputs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from aicompress.layer import GradientStats, InputStats, Layer, LayerInfo
from aicompress.measure import rel_error
from aicompress.methods.zeros import kept_zero
from aicompress.pipeline.calibration.requirements import MIN_ROWS, input_width
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.layerwise.report_rows import changed_row
from aicompress.pipeline.step.layer_plan import LayerPlan, layer_seed
from aicompress.report.model import LayerRow
from aicompress.weights import Weight


@dataclass(frozen=True)
class Ready:
    """A layer that has been compressed with others, before its turn to be written.

    Attributes:
        weight: its new weight.
        seconds: its share of the time.
    """

    weight: Weight
    seconds: float


@dataclass(frozen=True)
class Known:
    """What is known of a layer beside its weight, for methods that need it; its new weight where that is ready."""

    inputs: InputStats | None = None
    gradients: GradientStats | None = None
    movement: Tensor | None = None
    ready: Ready | None = None


def compress_parameter(
    plan: Plan, name: str, jobs: list[LayerPlan], known: Mapping[str, Known]
) -> tuple[Weight, list[LayerRow]]:
    """Apply the method to a parameter, or to the factors of one."""
    by_part = {job.info.part: job for job in jobs}
    if "" in by_part:
        weight, row = _apply(plan, by_part[""], known.get(by_part[""].info.name, Known()))
        return weight, [row]
    old = plan.checkpoint.weight(name)
    factors, rows = old.parts(), []
    of = {part: known.get(job.info.name, Known()) for part, job in by_part.items()}
    if "in" in by_part:
        factors["in"], row = _apply(plan, by_part["in"], of["in"])
        rows.append(row)
    if "out" in by_part:
        inputs = of["out"].inputs.through(factors["in"].dense()) if of["out"].inputs else None
        factors["out"], row = _apply(plan, by_part["out"], Known(inputs, of["out"].gradients))
        rows.append(row)
    return old.with_parts(factors), rows


def layer_of(plan: Plan, info: LayerInfo, known: Known) -> Layer:
    """A layer of the input as its method is given it."""
    layer = plan.checkpoint.layer(info, layer_seed(plan.recipe.seed, info.name))
    return dataclasses.replace(layer, inputs=known.inputs, gradients=known.gradients, movement=known.movement)


def _apply(plan: Plan, job: LayerPlan, known: Known) -> tuple[Weight, LayerRow]:
    layer = layer_of(plan, job.info, known)
    start = time.perf_counter()
    weight = plan.method.apply(layer, job.config) if known.ready is None else known.ready.weight
    if plan.method.command == "quantize":
        weight = kept_zero(layer, weight)
    seconds = time.perf_counter() - start + (0 if known.ready is None else known.ready.seconds)
    return weight, changed_row(plan.method, job, weight, rel_error(layer.weight, weight), seconds)


def completed(inputs: InputStats, layers: Sequence[LayerInfo]) -> InputStats:
    """What a method is given: of white noise where too few rows came; with `cross` where nothing is compressed yet."""
    if inputs.count < MIN_ROWS:
        return InputStats.white(input_width(layers))
    return inputs if inputs.cross is not None else dataclasses.replace(inputs, cross=inputs.gram)


def compress_together(plan: Plan, stats: Mapping[str, InputStats]) -> dict[str, Ready]:
    """What layers of a block can be compressed to in common, by parameter.

    Args:
        plan: the step.
        stats: by parameter; those that share their inputs have the same object.
    """
    together = plan.method.together
    found: dict[str, Ready] = {}
    for inputs, jobs in _sharing(plan, stats) if together is not None else ():
        assert together is not None
        start = time.perf_counter()
        known = Known(completed(inputs, [job.info for job in jobs]))
        weights = together([layer_of(plan, job.info, known) for job in jobs], jobs[0].config)
        share = (time.perf_counter() - start) / len(jobs)
        found.update({job.info.tensor: Ready(weight, share) for job, weight in zip(jobs, weights, strict=True)})
    return found


def compress_alone(plan: Plan, job: LayerPlan, known: Known) -> Ready:
    """A layer that is compressed alone."""
    start = time.perf_counter()
    weight = plan.method.apply(layer_of(plan, job.info, known), job.config)
    return Ready(weight, time.perf_counter() - start)


def _sharing(plan: Plan, stats: Mapping[str, InputStats]) -> list[tuple[InputStats, list[LayerPlan]]]:
    """Whole layers that have the same statistics and the same parameters of the method, where there are several."""
    found: list[tuple[InputStats, list[LayerPlan]]] = []
    for name, inputs in stats.items():
        (job, *more) = plan.by_tensor[name]
        if more or job.info.part or job.config is None:
            continue
        group = next((jobs for other, jobs in found if other is inputs and jobs[0].config == job.config), None)
        if group is None:
            found.append((inputs, [job]))
        else:
            group.append(job)
    return [(inputs, jobs) for inputs, jobs in found if len(jobs) > 1]
