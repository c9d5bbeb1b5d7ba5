"""Rows of the report, one a layer."""

from __future__ import annotations

import dataclasses
import math

from aicompress.errors import CompressError
from aicompress.methods.layerwise import LayerMethod
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.report.model import LayerRow
from aicompress.report.plan import PlanRow
from aicompress.weights import Weight, outline_nbytes


def changed_row(method: LayerMethod, job: LayerPlan, weight: Weight, error: float, seconds: float) -> LayerRow:
    """A compressed layer.

    Args:
        method: what compressed it.
        job: the layer's plan.
        weight: what it became, or the outline of that.
        error: ‖W − Ŵ‖_F / ‖W‖_F.
        seconds: in the method.

    Raises:
        CompressError: the error is not finite.
    """
    info = job.info
    if not math.isfinite(error):
        raise CompressError(
            f"{info.name}: {method.name} gave values that are not finite",
            "its range does not fit the stored dtype: exclude the layer, or choose a wider dtype",
        )
    detail = method.describe(job.config, weight)
    note = str(detail.pop("note", ""))
    size, form = outline_nbytes(weight), weight.form
    return LayerRow(info.name, info.kind, job.rule, method.name, form, detail, info.nbytes, size, error, seconds, note)


def idle_row(layer: LayerPlan) -> LayerRow:
    """A layer that is left alone."""
    info = layer.info
    return LayerRow(
        info.name, info.kind, "-", "-", info.stored, {}, info.nbytes, info.nbytes, 0.0, 0.0, "left as it is"
    )


def noted(row: LayerRow, note: str) -> LayerRow:
    """A row of a compressed layer with a note before its own."""
    return dataclasses.replace(row, note="; ".join(filter(None, (note, row.note)))) if row.method != "-" else row


def plan_row(method: LayerMethod, layer: LayerPlan) -> PlanRow:
    assert layer.outline is not None
    detail = {k: v for k, v in method.describe(layer.config, layer.outline).items() if k != "note"}
    info, size = layer.info, outline_nbytes(layer.outline)
    return PlanRow(info.name, info.kind, layer.rule, info.stored, layer.outline.form, detail, info.nbytes, size)
