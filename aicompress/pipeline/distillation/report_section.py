"""The training section of a distillation's report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from aicompress.checkpoint import Checkpoint
from aicompress.pipeline.distillation.mean_teacher import Averaged
from aicompress.pipeline.distillation.training import Trainer


def training_section(trainer: Trainer, teachers: Sequence[Checkpoint], cached: bool) -> dict[str, Any]:
    """Loss curve, best step, data and speed of a finished training run.

    Args:
        trainer: the run.
        teachers: the checkpoints that were learned from; none for the student's average.
        cached: its outputs were computed once.
    """
    history, split, trained = trainer.history, trainer.setup.split, trainer.trained
    seconds = history.seconds or float("inf")
    averaged = trainer.setup.averaged
    terms = [f"{config.weight:g} {method.name}" for method, config in trainer.setup.loss.terms]
    return {
        "teacher": _described(teachers, averaged),
        "data": dataclasses.asdict(trainer.setup.samples.source),
        "loss": " + ".join(terms if averaged is None else ["1 cross-entropy", *terms]),
        "curve": [dataclasses.asdict(point) for point in history.curve],
        "best_step": history.best_step,
        "held_out_before": history.before,
        "held_out_after": history.best,
        "held_out_samples": len(split.held_out),
        "train_samples": len(split.train),
        "epochs": history.samples / len(split.train),
        "trained_parameters": sum(parameter.numel() for parameter in trained.parameters.values()),
        "zeros_kept": sum(int(zero.sum()) for zero in trained.zeros.values()),
        "precision": trainer.settings.precision,
        "processes": trainer.team.size,
        "cached_teacher": cached,
        "samples_per_second": history.samples / seconds,
        "tokens_per_second": history.tokens / seconds if history.tokens else None,
        "seconds": history.seconds,
    }


def _described(teachers: Sequence[Checkpoint], averaged: Averaged | None) -> dict[str, Any]:
    """What was learned from: checkpoints, or the student's average, which says how it is made."""
    if teachers:
        size = sum(ref.spec.nbytes for teacher in teachers for ref in teacher.tensors.values())
        return {"path": " + ".join(str(teacher.path) for teacher in teachers), "bytes": size}
    return {} if averaged is None else {"average_of_the_student": averaged.settings.model_dump()}
