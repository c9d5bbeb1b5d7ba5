"""Layers that share their inputs are compressed together where the method gains by it, before they are written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

from aicompress.layer import InputStats, LayerInfo
from aicompress.pipeline.calibration.request import input_width
from aicompress.pipeline.layerwise import Known, Ready, layer_of
from aicompress.pipeline.plan import LayerPlan, Plan

MIN_ROWS = 16  # with fewer calibration rows a layer is compressed as if nothing were known of its inputs


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


def compressed(plan: Plan, job: LayerPlan, known: Known) -> Ready:
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
