"""Write every parameter of a student, with a row of the report for each of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from aicompress.layer import LayerInfo
from aicompress.pipeline.distillation.layer_by_layer.blockwise import BlockwiseTuning
from aicompress.pipeline.distillation.loop.state import StateFile
from aicompress.pipeline.distillation.plan import DistillPlan
from aicompress.pipeline.distillation.report_section import blockwise_section
from aicompress.pipeline.distillation.trained.student import Student
from aicompress.pipeline.step.report import Results
from aicompress.pipeline.step.run import OpenOutput
from aicompress.report.model import LayerRow
from aicompress.weights import Weight

UNCHANGED = "no step was better than the input on the held-out samples: the weights are the input's"


def write_tuned(plan: DistillPlan, tuning: BlockwiseTuning, opened: OpenOutput) -> Results:
    """Tune all blocks, and write every parameter of what is better, with a row for each layer."""
    tuning.heal()
    places = tuning.files.names()
    better = tuning.history.best_step > 0
    student = Student(plan.checkpoint, plan.student_mode, {name: {} for name in places}, {})

    def value_of(name: str) -> Tensor | Weight:
        return tuning.files.value(name, places[name]) if better and name in places else student.original(name)

    rows = written(plan, student, value_of, opened)
    StateFile(tuning.files.folder.parent).remove()
    moved = sum(math.prod(plan.checkpoint.parameters()[name].shape) for name in places)
    warnings = plan.warnings if better else (*plan.warnings, UNCHANGED)
    return Results(rows, warnings, training=blockwise_section(tuning, moved), notes=plan.told)


def written(
    plan: DistillPlan, student: Student, value_of: Callable[[str], Tensor | Weight], opened: OpenOutput
) -> tuple[LayerRow, ...]:
    """Write every parameter; returns a row for each layer."""
    infos: dict[str, list[LayerInfo]] = {}
    for info in plan.layers:
        infos.setdefault(info.tensor, []).append(info)
    rows: list[LayerRow] = []
    for name in plan.output.parameters:
        value = value_of(name)
        for disk, tensor in plan.output.encode(name, value).items():
            opened.writer.put(disk, tensor)
        rows += [
            student.row(info, value, plan.recipe.method.name, plan.output.nbytes(name, info.part))
            for info in infos.get(name, [])
        ]
    return tuple(rows)
