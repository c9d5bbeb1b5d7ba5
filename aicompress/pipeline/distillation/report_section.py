"""The training section of a distillation's report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from aicompress.checkpoint import Checkpoint
from aicompress.pipeline.distillation.data.samples import TrainingSamples
from aicompress.pipeline.distillation.data.splits import Split
from aicompress.pipeline.distillation.layer_by_layer.blockwise import BlockwiseTuning
from aicompress.pipeline.distillation.loop.state import TrainingHistory
from aicompress.pipeline.distillation.loop.trainer import Trainer
from aicompress.pipeline.distillation.teachers.mean_teacher import Averaged


def training_section(trainer: Trainer, teachers: Sequence[Checkpoint], cached: bool) -> dict[str, Any]:
    """Loss curve, best step, data and speed of a finished training run.

    Args:
        trainer: the run.
        teachers: the checkpoints that were learned from; none for the student's average.
        cached: its outputs were computed once.
    """
    trained, setup = trainer.trained, trainer.setup
    whole = {**trained.parameters, **setup.shards.divided}
    held = sum(parameter.numel() for parameter in trained.parameters.values())
    terms = [f"{config.weight:g} {method.name}" for method, config in setup.loss.terms]
    return {
        "teacher": described(teachers, setup.averaged),
        "loss": " + ".join(terms if setup.averaged is None else ["1 cross-entropy", *terms]),
        **curve_section(trainer.history, setup.split, setup.samples),
        "trained_parameters": sum(parameter.numel() for parameter in whole.values()),
        "zeros_kept": sum(setup.shards.zeros.get(name, int(zero.sum())) for name, zero in trained.zeros.items()),
        "precision": trainer.settings.precision,
        "processes": trainer.team.size,
        **({"parameters_per_process": held} if setup.shards.divided else {}),
        "cached_teacher": cached,
    }


def blockwise_section(tuning: BlockwiseTuning, moved: int) -> dict[str, Any]:
    """The same of a run that has tuned block after block; `moved` counts the numbers that could move."""
    plan = tuning.plan
    return {
        "teacher": described(plan.teachers, None),
        "loss": " + ".join(f"{config.weight:g} {method.name}" for method, config in plan.losses),
        **curve_section(tuning.history, plan.split, plan.samples),
        "trained_parameters": moved,
        "zeros_kept": 0,
        "precision": plan.training.precision,
        "processes": tuning.team.size,
        "cached_teacher": False,
    }


def curve_section(history: TrainingHistory, split: Split, samples: TrainingSamples) -> dict[str, Any]:
    """Loss curve, best step, data and speed."""
    seconds = history.seconds or float("inf")
    return {
        "data": dataclasses.asdict(samples.source),
        "curve": [dataclasses.asdict(point) for point in history.curve],
        "best_step": history.best_step,
        "held_out_before": history.before,
        "held_out_after": history.best,
        "held_out_samples": len(split.held_out),
        "train_samples": len(split.train),
        "epochs": history.samples / len(split.train),
        "samples_per_second": history.samples / seconds,
        "tokens_per_second": history.tokens / seconds if history.tokens else None,
        "seconds": history.seconds,
    }


def described(teachers: Sequence[Checkpoint], averaged: Averaged | None) -> dict[str, Any]:
    """What was learned from: checkpoints, or the student's average, which says how it is made."""
    if teachers:
        size = sum(ref.spec.nbytes for teacher in teachers for ref in teacher.tensors.values())
        return {"path": " + ".join(str(teacher.path) for teacher in teachers), "bytes": size}
    return {} if averaged is None else {"average_of_the_student": averaged.settings.model_dump()}
