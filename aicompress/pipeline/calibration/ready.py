"""Layers that share their inputs are compressed together where the method gains by it, before they are written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

from aicompress.layer import GradientStats, InputStats, LayerInfo
from aicompress.pipeline.calibration.request import input_width
from aicompress.pipeline.layerwise import Known, Ready, layer_of
from aicompress.pipeline.plan import LayerPlan, Plan

Read = Callable[[str], GradientStats | None]  # moments of a layer's gradients by its name

MIN_ROWS = 16  # with fewer calibration rows a layer is compressed as if nothing were known of its inputs


DATA_FREE = "calibration rows: data-free"
UNREACHED = "no gradient reaches it: data-free"


def completed(inputs: InputStats, layers: Sequence[LayerInfo]) -> InputStats:
    """What a method is given: of white noise where too few rows came; with `cross` where nothing is compressed yet."""
    if inputs.count < MIN_ROWS:
        return InputStats.white(input_width(layers))
    return inputs if inputs.cross is not None else dataclasses.replace(inputs, cross=inputs.gram)


def known_of(plan: Plan, name: str, inputs: InputStats, read: Read | None) -> tuple[dict[str, Known], str]:
    """What a parameter's layers are compressed with, by layer name, and what to say of it in their rows."""
    infos = [layer.info for layer in plan.by_tensor[name]]
    notes: list[str] = []
    if plan.needs - {"gradients"} and inputs.count < MIN_ROWS:
        notes.append(f"{inputs.count} {DATA_FREE}")
    if plan.needs - {"gradients"}:
        inputs = completed(inputs, infos)
    found = {info.name: None if read is None else read(info.name) for info in infos}
    for info in infos if read is not None else ():
        moments = found[info.name]
        if moments is None or not moments.square.any():
            notes.append(UNREACHED)
            found[info.name] = GradientStats.flat(info.shape)
    known = {key: Known(inputs if inputs.count else None, moments) for key, moments in found.items()}
    return known, "; ".join(dict.fromkeys(notes))


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
