"""Check whether student, teacher, losses and data of a distillation fit together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError, RecipeError, Refused, raise_all
from aicompress.methods.distill.logits import UNLABELLED
from aicompress.methods.outputs import Anatomy
from aicompress.methods.training import DistillMethod, LossConfig
from aicompress.model.distillation.outputs import Runner, anatomy
from aicompress.model.loading.tokenizer import FILES
from aicompress.pipeline.distillation.batches import Samples
from aicompress.recipe.distillation import DistillRecipe

Losses = tuple[tuple[DistillMethod[Any], LossConfig], ...]


def require_teacher(recipe: DistillRecipe, teachers: int, stored: bool) -> None:
    """Refuse a student with no teacher, or with other teachers beside the average of itself.

    Args:
        recipe: what to do.
        teachers: how many checkpoints are given.
        stored: the outputs of one are stored.

    Raises:
        Refused: there are none, or too many.
    """
    if recipe.mean_teacher is not None and teachers:
        raise Refused("the recipe's mean_teacher is the teacher: another one is given", "leave out one of the two")
    if recipe.mean_teacher is None and not teachers and not stored:
        raise Refused("no teacher is given", "give --teacher TEACHER, or let the recipe make the student out of IN")


def anatomy_of(checkpoint: Checkpoint, run: Runner, recipe: DistillRecipe) -> Anatomy:
    """What the outputs of a student or a teacher will look like.

    Raises:
        RecipeError: the recipe does not say how to run a bare file.
    """
    return anatomy(checkpoint, run, _last_layer(checkpoint, recipe), recipe.data.labels is not None)


def _last_layer(checkpoint: Checkpoint, recipe: DistillRecipe) -> str | None:
    """The layer of a bare file whose rows are the classes.

    Raises:
        RecipeError: the recipe does not say how to run the file.
    """
    if checkpoint.config is not None:
        return None
    if recipe.model is None:
        raise RecipeError(
            f"{checkpoint.path} names no architecture, and the recipe no model",
            "model: {sequential: [flatten, fc1, relu, fc2]}",
        )
    items = [item.partition(":")[0] for item in recipe.model.sequential]
    named = [item for item in items if f"{item}.weight" in checkpoint.parameters()]
    return named[-1] if named else None


def mismatches(
    losses: Losses, student: Runner, teacher: Runner, anatomies: tuple[Anatomy, Anatomy]
) -> list[CompressError]:
    """Errors that name the losses which the two models cannot have."""
    reads_logits = any("logits" in method.reads for method, _ in losses)
    if reads_logits and student.task != teacher.task:
        what = {"causal": "a causal language model", "masked": "a masked language model", "classes": "a classifier"}
        names = [what.get(run.task, f"a {run.task}") for run in (student, teacher)]
        return [Refused(f"the student is {names[0]} and the teacher {names[1]}", "logits of one kind can be compared")]
    problems = [(method.name, method.check(*anatomies, config)) for method, config in losses]
    return [RecipeError(f"{name}: {problem[0]}", problem[1]) for name, problem in problems if problem is not None]


def several(losses: Losses, teachers: Sequence[Anatomy]) -> list[CompressError]:
    """Errors that name what keeps the outputs of several teachers from being averaged."""
    if len(teachers) == 1:
        return []
    inner = [method.name for method, _ in losses if not method.reads <= {"logits", "embedding"}]
    if inner:
        hint = "take losses on logits or embeddings, or one teacher"
        return [RecipeError(f"{inner[0]} compares what goes on inside a teacher: several cannot be averaged", hint)]
    widths = sorted({teacher.embedding for teacher in teachers if teacher.embedding is not None})
    if len(widths) > 1 and any("embedding" in method.reads for method, _ in losses):
        told = " and ".join(map(str, widths))
        return [Refused(f"the teachers' embeddings are {told} wide", "teachers of one width can be averaged")]
    return []


def require_fit(
    losses: Losses, student: tuple[Runner, Anatomy], runs: Sequence[Runner], anatomies: Sequence[Anatomy]
) -> None:
    """Refuse losses that a student and its teachers cannot have.

    Args:
        losses: of the recipe.
        student: how it is run, and what it gives.
        runs, anatomies: the same of each teacher.

    Raises:
        Refused: or Problems, naming them.
    """
    for run, teacher in zip(runs, anatomies, strict=True):
        raise_all(mismatches(losses, student[0], run, (student[1], teacher)))
    raise_all(several(losses, anatomies))


def require_classes(samples: Samples, student: Anatomy) -> None:
    """Refuse labels that are no classes of the student, and data in which no sample has one.

    Raises:
        RecipeError: there are such.
    """
    labels = samples.labels
    if labels is None or student.classes is None:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < UNLABELLED or high < 0 or high >= student.classes:
        raise RecipeError(
            f"labels go from {low} to {high}, the student has {student.classes} classes", "check data.labels"
        )


def tokenizer_warnings(student: Checkpoint, teacher: Checkpoint) -> list[str]:
    """A warning where the tokenizers of the two are not the same."""
    one, other = student.source.folder, teacher.source.folder
    if one is None or other is None:
        return []
    differ = [
        name
        for name in FILES
        if (one / name).is_file()
        and (other / name).is_file()
        and (one / name).read_bytes() != (other / name).read_bytes()
    ]
    if not differ:
        return []
    return [f"the tokenizers of student and teacher differ ({', '.join(differ)}): the student's is used for both"]
