"""Rows of the report, one a layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from aicompress.checkpoint.naming import layer_name
from aicompress.errors import CompressError
from aicompress.methods.capabilities import Rounded
from aicompress.methods.decisions import Width
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.pipeline.layerwise.experts import one_of
from aicompress.pipeline.step.layer_plan import Group, LayerPlan
from aicompress.report.model import LayerRow
from aicompress.report.plan import PlanRow
from aicompress.weights import TensorSpec, Weight, outline_nbytes

ROUNDED_NOTE = "less would be lost in no more bytes at"
ZEROS_NOTE = "it was all zeros and is not now, so its error is no share of it"
COARSE_NOTE = "too small for float16 scales"
TURNED_NOTE = "error against the factor as it was turned, and fitted to the other one"
ROTATED_NOTE = "error against the rotated weight"
COARSE = 8 * 2.0**-24  # a float16 scale of no more may lose an eighth or more to its rounding
GONE = 1 - 1e-6  # a relative error, less rounding
SHARE = 0.01  # of a weight's scales


def is_coarse(weight: Weight) -> bool:
    """Whether many of a weight's scales are so small that float16 makes its codes coarser than their bits say."""
    scales = [tensor for suffix, tensor in weight.tensors().items() if suffix.endswith("scale")]
    halves = [scale for scale in scales if scale.dtype is torch.float16 and scale.numel()]
    return any(float((scale.abs() <= COARSE).float().mean()) > SHARE for scale in halves)


def coarse(rows: Sequence[LayerRow]) -> list[str]:
    """A warning that names layers whose values are too small for their scales."""
    names = [row.name for row in rows if COARSE_NOTE in row.note]
    if not names:
        return []
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return [f"values of {names[0]}{more} are too small for float16 scales: set method.scale_dtype=float32"]


def rounded_note(rounded: Rounded | None) -> str:
    """Says that rounding a layer would have been the better use of its bytes, where that is so."""
    if rounded is None or rounded.error is None or rounded.instead_of is None or rounded.error >= rounded.instead_of:
        return ""
    return f"{ROUNDED_NOTE} {rounded.bits} bits: error {rounded.error:.2g}, not {rounded.instead_of:.2g}"


def better_rounded(rows: Sequence[LayerRow]) -> list[str]:
    """A warning that counts layers which would have lost less if they had been rounded."""
    better = [row for row in rows if ROUNDED_NOTE in row.note]
    if not better:
        return []
    told = next(part for part in better[0].note.split("; ") if part.startswith(ROUNDED_NOTE))
    return [
        f"layers that would lose less if they were quantized, in no more bytes: {len(better)}, such as "
        f"{better[0].name} at{told.removeprefix(ROUNDED_NOTE)}; low rank pays where time is to be saved"
    ]


def vanished(rows: Sequence[LayerRow]) -> list[str]:
    """A warning that names layers of whose weights nothing is left: ‖W − Ŵ‖ is ‖W‖."""
    names = [row.name for row in rows if (row.rel_error or 0.0) >= GONE]
    if not names:
        return []
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return [f"all weights of {names[0]}{more} became zero: exclude what is so small, or give it more bits by a rule"]


def changed_row(
    method: AnyLayerMethod, job: LayerPlan, weight: Weight, error: float | None, seconds: float
) -> LayerRow:
    """A compressed layer.

    Args:
        method: what compressed it.
        job: the layer's plan.
        weight: what it became, or the outline of that.
        error: ‖W − Ŵ‖_F / ‖W‖_F; None where W was zero and is not now.
        seconds: in the method.

    Raises:
        CompressError: the error is not finite.
    """
    info = job.info
    if error is not None and not math.isfinite(error):
        raise CompressError(
            f"{info.name}: {method.name} gave values that are not finite",
            "its range does not fit the stored dtype: exclude the layer, or choose a wider dtype",
        )
    detail = method.describe(job.config, one_of(weight))
    note = "; ".join(filter(None, ("" if error is not None else ZEROS_NOTE, str(detail.pop("note", "")))))
    size, form = outline_nbytes(weight), weight.form
    return LayerRow(info.name, info.kind, job.rule, method.name, form, detail, info.nbytes, size, error, seconds, note)


def idle_row(layer: LayerPlan) -> LayerRow:
    """A layer that is left alone."""
    info = layer.info
    note = f"stored with {layer_name(info.owner)}" if info.owner else "left as it is"
    return LayerRow(info.name, info.kind, "-", "-", info.stored, {}, info.nbytes, info.nbytes, 0.0, 0.0, note)


def shared_note(group: Group, parameter: str) -> str:
    """Where a layer of a group stores what it shares; empty for the one that stores it."""
    owner = group.owners(parameter).get(group.part)
    return f"stored with {layer_name(owner)}" if owner else ""


def noted(row: LayerRow, note: str) -> LayerRow:
    """A row of a compressed layer with a note before its own."""
    return dataclasses.replace(row, note="; ".join(filter(None, (note, row.note)))) if row.method != "-" else row


def plan_row(method: AnyLayerMethod, layer: LayerPlan, size: int) -> PlanRow:
    """The row of a layer that a dry run prints, and that takes `size` bytes of the output."""
    assert layer.outline is not None
    detail = {k: v for k, v in method.describe(layer.config, one_of(layer.outline)).items() if k != "note"}
    info = layer.info
    return PlanRow(info.name, info.kind, layer.rule, info.stored, layer.outline.form, detail, info.nbytes, size)


def open_row(row: PlanRow, widths: Sequence[Width]) -> PlanRow:
    """The row of a layer whose width is to be searched: what it may get instead of what it was planned with."""
    groups = {width.group for width in widths if width.group is not None}
    detail = {**row.detail, "bits": _either({width.bits for width in widths})}
    detail |= {"group": _either(groups)} if groups else {}
    return dataclasses.replace(row, bytes_after=None, detail=detail)


def _either(numbers: set[int]) -> str:
    *others, last = map(str, sorted(numbers))
    return f"{', '.join(others)} or {last}" if others else last


def parts_of_bytes(weights: Sequence[Weight], part: str) -> list[int]:
    """The bytes of weights that share a part, the first of which stores it, in proportion to what they stand for."""
    borrowed = sum(spec.nbytes for spec in _borrowed(weights[0], part))
    total = sum(outline_nbytes(weight) for weight in weights) - (len(weights) - 1) * borrowed
    numbers = [weight.shape[0] * weight.shape[1] for weight in weights]
    return [total * number // sum(numbers) for number in numbers]


def _borrowed(weight: Weight, part: str) -> list[TensorSpec]:
    suffixes = weight.borrowed(part)
    return [spec for suffix, spec in weight.specs().items() if suffix in suffixes]
