"""Check whether student, teacher, losses and data of a distillation fit together."""

from __future__ import annotations

from typing import Any

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError, RecipeError, Refused
from aicompress.methods.distill.logits import UNLABELLED
from aicompress.methods.outputs import Anatomy
from aicompress.methods.training import DistillMethod, LossConfig
from aicompress.model.distillation.outputs import Runner, anatomy
from aicompress.model.loading.tokenizer import FILES
from aicompress.pipeline.distillation.batches import Samples
from aicompress.recipe.distillation import DistillRecipe

Losses = tuple[tuple[DistillMethod[Any], LossConfig], ...]


def require_teacher(recipe: DistillRecipe, teacher: object) -> None:
    """One teacher: a checkpoint, or the average of the student.

    Raises:
        Refused: there are two, or none.
    """
    if recipe.mean_teacher is not None and teacher is not None:
        raise Refused("the recipe's mean_teacher is the teacher: another one is given", "leave out one of the two")
    if recipe.mean_teacher is None and teacher is None:
        raise Refused("no teacher is given", "give --teacher TEACHER, or let the recipe make the student out of IN")


def anatomies_of(
    student: tuple[Checkpoint, Runner], teacher: tuple[Checkpoint, Runner], recipe: DistillRecipe
) -> tuple[Anatomy, Anatomy]:
    labels = recipe.data.labels is not None
    one, other = (anatomy(c, r, _last_layer(c, recipe), labels) for c, r in (student, teacher))
    return one, other


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


def require_classes(samples: Samples, student: Anatomy) -> None:
    labels = samples.labels
    if labels is None or student.classes is None:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < UNLABELLED or high < 0 or high >= student.classes:
        raise RecipeError(
            f"labels go from {low} to {high}, the student has {student.classes} classes", "check data.labels"
        )


def tokenizer_warnings(student: Checkpoint, teacher: Checkpoint) -> list[str]:
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
