"""Check whether student, teacher, losses and data of a distillation fit together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.data import arrays
from aicompress.errors import CompressError, RecipeError, Refused, raise_all
from aicompress.methods.distill.logits import UNLABELLED
from aicompress.methods.losses import DistillMethod, LossConfig
from aicompress.methods.outputs import OutputShapes
from aicompress.model.blocks.input_errors import input_errors_refused
from aicompress.model.distillation.outputs import Runner, shapes_of_outputs
from aicompress.model.loading.tokenizer import FILES, load_tokenizer, vocabulary_digest
from aicompress.model.vocabulary.vocabulary import numbers_among, unknown_tokens
from aicompress.pipeline.distillation.data.samples import TrainingSamples, bare_module, require_arrays
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
        raise Refused(
            "no teacher is given",
            "give --teacher TEACHER, or a recipe that makes the student of IN, such as `-r distill/student-layers`",
        )


def output_shapes_of(
    checkpoint: Checkpoint, run: Runner, recipe: DistillRecipe, allow_code: bool = False
) -> OutputShapes:
    """What the outputs of a student or a teacher will look like.

    Raises:
        RecipeError: the recipe does not say how to run a bare file.
        Refused: a factory without --allow-code, or whose module does not take the data or gives no logits.
    """
    labels = recipe.data.labels is not None
    if checkpoint.config is None and recipe.model is not None and recipe.model.factory is not None:
        return OutputShapes(classes=_classes_given(checkpoint, recipe, allow_code), labels=labels)
    return shapes_of_outputs(checkpoint, run, _last_layer(checkpoint, recipe), labels)


@torch.no_grad()
def _classes_given(checkpoint: Checkpoint, recipe: DistillRecipe, allow_code: bool) -> int:
    """The classes that a factory's module gives a sample: its layers do not tell, so that it is run on one."""
    module = bare_module(checkpoint, recipe.model, allow_code)
    assert module is not None
    require_arrays(recipe.data)
    inputs, _, _ = arrays(recipe.data)
    with input_errors_refused("training data"):
        given = module.eval()(inputs[:1])
    if not isinstance(given, Tensor) or given.ndim != 2:
        shown = f"a tensor {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise Refused(f"the factory's module gives {shown} for a sample", "logits are a tensor (samples, classes)")
    return given.shape[1]


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
    losses: Losses, student: Runner, teacher: Runner, all_shapes: tuple[OutputShapes, OutputShapes]
) -> list[CompressError]:
    """Errors that name the losses which the two models cannot have."""
    reads_logits = any("logits" in method.reads for method, _ in losses)
    if reads_logits and student.task != teacher.task:
        what = {"causal": "a causal language model", "masked": "a masked language model", "classes": "a classifier"}
        names = [what.get(run.task, f"a {run.task}") for run in (student, teacher)]
        return [Refused(f"the student is {names[0]} and the teacher {names[1]}", "logits of one kind can be compared")]
    problems = [(method.name, method.check(*all_shapes, config)) for method, config in losses]
    return [RecipeError(f"{name}: {problem[0]}", problem[1]) for name, problem in problems if problem is not None]


def several(losses: Losses, teachers: Sequence[OutputShapes]) -> list[CompressError]:
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
    losses: Losses, student: tuple[Runner, OutputShapes], runs: Sequence[Runner], all_shapes: Sequence[OutputShapes]
) -> None:
    """Refuse losses that a student and its teachers cannot have.

    Args:
        losses: of the recipe.
        student: how it is run, and what it gives.
        runs, all_shapes: the same of each teacher.

    Raises:
        Refused: or Problems, naming them.
    """
    for run, teacher in zip(runs, all_shapes, strict=True):
        raise_all(mismatches(losses, student[0], run, (student[1], teacher)))
    raise_all(several(losses, all_shapes))


def require_classes(samples: TrainingSamples, student: OutputShapes) -> None:
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


def token_numbers(student: Checkpoint, teacher: Checkpoint) -> Tensor | None:
    """The teacher's numbers of the student's tokens, (tokens,) int64; None where both number them alike.

    A student whose vocabulary was pruned has fewer of the same tokens, with other numbers.

    Raises:
        Refused: the student has tokens that the teacher has not.
    """
    one, other = student.source.folder, teacher.source.folder
    if student is teacher or vocabulary_digest(one) == vocabulary_digest(other):
        return None
    own, its = load_tokenizer(one), load_tokenizer(other)
    if own is None or its is None:
        return None
    unknown = unknown_tokens(own, its)
    numbers = None if unknown else numbers_among(own, its)
    if numbers is None:
        shown = ", ".join(map(repr, unknown[:3])) + (f" and {len(unknown) - 3:,} more" if len(unknown) > 3 else "")
        what = f"the teacher's tokenizer has no {shown}" if unknown else "some of the student's tokens have no name"
        raise Refused(f"the student has another vocabulary: {what}", "a teacher needs all tokens of its student")
    return None if torch.equal(numbers, torch.arange(len(numbers))) else numbers


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
