"""Movement of trained weights for movement pruning: -Σ w g of every trained matrix, in a file of statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.reader import digests
from aicompress.checkpoint.statistics import StatisticsWriter
from aicompress.data import SampleSource
from aicompress.errors import Refused
from aicompress.layer import LayerInfo, as_matrix
from aicompress.pipeline.distillation.loop.trainer import Trainer
from aicompress.pipeline.distillation.trained.student import Student


def require_free(path: Path | None) -> None:
    """Refuse a path where no file of statistics can be written.

    Raises:
        Refused: it exists, or its name does not say what it is.
    """
    if path is None:
        return
    if path.suffix != ".safetensors":
        raise Refused(f"{path}: statistics are kept in a .safetensors file", "choose a name that ends so")
    if path.exists():
        raise Refused(f"{path} exists", "choose another name: a training run records statistics of its own")


def watched(student: Student) -> tuple[str, ...]:
    """Names of the trained parameters that are plain matrices."""
    entries = student.checkpoint.manifest.entries
    return tuple(
        name
        for name, stored in student.stored.items()
        if name not in entries and set(stored) == {""} and stored[""].ndim >= 2
    )


def write(path: Path, written: Checkpoint, layers: Sequence[LayerInfo], trainer: Trainer, source: SampleSource) -> None:
    """Write the movement of every watched layer to a file of statistics.

    Args:
        path: the file.
        written: the checkpoint that the run wrote; its digests tell the file's user that they belong together.
        layers: of the student.
        trainer: the finished run.
        source: the samples that were learned from.
    """
    infos = {info.tensor: info for info in layers}
    with StatisticsWriter(path) as writer:
        for name, movement in trainer.tensors.movement.items():
            if name in infos:
                moved = as_matrix(movement.detach().cpu(), infos[name].transposed)
                writer.add_movement(infos[name].name, moved.float(), trainer.history.step)
        record = {"data": [dataclasses.asdict(source)], "processes": trainer.team.size}
        writer.seal(digests(written.source), record)
