"""What a training run leaves for movement pruning: -Σ w g of every trained matrix, in a file of statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.reader import digests
from aicompress.checkpoint.statistics import StatisticsWriter
from aicompress.errors import Refused
from aicompress.layer import as_matrix
from aicompress.pipeline.distillation.plan import DistillPlan
from aicompress.pipeline.distillation.student import Student
from aicompress.pipeline.distillation.training import Trainer


def require_free(path: Path | None) -> None:
    """A file of statistics can be written there.

    Raises:
        Refused: it exists, or its name does not say what it is.
    """
    if path is None:
        return
    if path.suffix != ".safetensors":
        raise Refused(f"{path}: statistics are kept in a .safetensors file", "choose a name that ends so")
    if path.exists():
        raise Refused(f"{path} exists", "choose another name: a training run records statistics of its own")


def watched(student: Student) -> Mapping[str, str]:
    """Trained parameters that are plain matrices, and the checkpoint's names for them."""
    entries = student.checkpoint.manifest.entries
    plain = [name for name, found in student.stored.items() if name not in entries and set(found) == {""}]
    return {name: name for name in plain if student.stored[name][""].ndim >= 2}


def write(path: Path, plan: DistillPlan, names: Mapping[str, str], trainer: Trainer) -> None:
    """Keep the movement of every layer beside the digests of the checkpoint that the run wrote."""
    infos = {info.tensor: info for info in plan.layers}
    written = Checkpoint.open(plan.output.destination.path)
    with StatisticsWriter(path) as writer:
        for parameter, name in names.items():
            if name in infos:
                moved = as_matrix(trainer.movement[parameter].detach().cpu(), infos[name].transposed)
                writer.add_movement(infos[name].name, moved.float(), trainer.course.step)
        record = {"data": [dataclasses.asdict(plan.samples.source)], "processes": trainer.team.size}
        writer.seal(digests(written.source), record)
