"""Plan a distillation: checkpoints, recipe and data checked against each other, every output byte known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.place import require_writable
from aicompress.errors import CompressError, RecipeError, Refused, raise_all
from aicompress.layer import Kind, LayerInfo
from aicompress.methods.outputs import Anatomy
from aicompress.methods.training import DistillMethod, LossConfig, get_loss
from aicompress.model.distillation.outputs import Runner, anatomy, runner
from aicompress.model.loading.tokenizer import FILES, load_tokenizer
from aicompress.pipeline.distillation.batches import Division, Samples, divide
from aicompress.pipeline.distillation.samples import read_samples
from aicompress.pipeline.distillation.teacher import CACHE_BYTES, Loss
from aicompress.pipeline.step.checks import known_kinds, left_out, place_problems, require_space, stored_outline
from aicompress.pipeline.step.dry_run import summarize
from aicompress.pipeline.step.output import DIGEST, Destination, Output, Planned, arrange, lineage_step, with_digests
from aicompress.recipe.distillation import DistillRecipe, Training
from aicompress.report.plan import PlanRow, PlanSummary

Losses = tuple[tuple[DistillMethod[Any], LossConfig], ...]


@dataclass(frozen=True)
class DistillPlan:
    """A distillation that can be run, or printed.

    Attributes:
        checkpoint: the student.
        teacher: the teacher.
        recipe: what to do.
        losses: terms of the loss.
        training: the recipe's settings, precision resolved.
        runner, teacher_runner: how the two models are run.
        layers: every layer of the student.
        samples: what is learnt from, tokenized.
        division: which samples are trained on, and when.
        output: every file and byte of the output.
        kinds: what the model definition says of the parameters.
        keep_zeros: weights that are zero stay zero.
        cached: the teacher's outputs are computed once.
        warnings: what the user should know.
        allow_code: a factory that the recipe names may run.
    """

    checkpoint: Checkpoint
    teacher: Checkpoint
    recipe: DistillRecipe
    losses: Losses
    training: Training
    runner: Runner
    teacher_runner: Runner
    layers: tuple[LayerInfo, ...]
    samples: Samples
    division: Division
    output: Output
    kinds: Mapping[str, Kind | None] | None
    keep_zeros: bool
    cached: bool
    warnings: tuple[str, ...]
    allow_code: bool = False

    def student_module(self) -> nn.Module | None:
        """The module of a bare file, to be filled; None for a checkpoint that names its architecture."""
        return _module(self.checkpoint, self.recipe, self.allow_code)

    def teacher_module(self) -> nn.Module | None:
        """The same for the teacher."""
        return _module(self.teacher, self.recipe, self.allow_code)

    def summary(self) -> PlanSummary:
        """What a dry run prints."""
        name = " + ".join(method.name for method, _ in self.losses)
        rows = [
            PlanRow(i.name, i.kind, "method", i.stored, i.stored, {"loss": name}, i.nbytes, i.nbytes)
            for i in self.layers
        ]
        return summarize(self.output, self.checkpoint, rows, 0, self.warnings)


def make_plan(
    source: str | Path, teacher: str | Path, destination: Destination, recipe: DistillRecipe, allow_code: bool = False
) -> DistillPlan:
    """Check everything and lay out the output; reads headers, configs and the data.

    Args:
        source: the student's checkpoint.
        teacher: the teacher's.
        destination: where the trained student goes.
        recipe: what to do.
        allow_code: a factory that the recipe names may run.

    Raises:
        Refused: or Problems, everything that is wrong.
    """
    student, tutor = Checkpoint.open(source), Checkpoint.open(teacher)
    raise_all(place_problems([student, tutor], destination, recipe.gates))
    require_writable(destination.path)
    run, run_teacher = runner(student), runner(tutor)
    losses = tuple((get_loss(config.name), config) for config in recipe.losses)
    minds = _anatomies((student, run), (tutor, run_teacher), recipe)
    raise_all(_mismatches(losses, run, run_teacher, minds))
    kinds, warnings = known_kinds(student)
    samples = read_samples(recipe.data, run.task, student, load_tokenizer(student.source.folder))
    _check_labels(samples, minds[0])
    training = recipe.training.model_copy(update={"precision": resolved_precision(recipe.training.precision)})
    division = divide(samples, training.held_out, training.batch, recipe.seed)
    layers = tuple(student.layers(kinds))
    step = lineage_step("distill", recipe, student.source)
    step["teacher"] = {"inputs": {file.name: DIGEST for file in tutor.source.files}}
    output = arrange(student, destination, _parameters(student, layers), step)
    require_space(output)
    return DistillPlan(
        student, tutor, recipe, losses, training, run, run_teacher, layers, samples, division, output, kinds,
        _keeps_zeros(training, student), _cached(training, losses, (run_teacher, minds[1]), samples, division),
        (*warnings, *_tokenizer_warnings(student, tutor), *left_out(student)), allow_code,
    )  # fmt: skip


def _anatomies(
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


def _mismatches(
    losses: Losses, student: Runner, teacher: Runner, minds: tuple[Anatomy, Anatomy]
) -> list[CompressError]:
    """Losses that the two models cannot have."""
    reads_logits = any("logits" in method.reads for method, _ in losses)
    if reads_logits and student.task != teacher.task:
        what = {"causal": "a causal language model", "masked": "a masked language model", "classes": "a classifier"}
        names = [what.get(run.task, f"a {run.task}") for run in (student, teacher)]
        return [Refused(f"the student is {names[0]} and the teacher {names[1]}", "logits of one kind can be compared")]
    found = [method.check(*minds, config) for method, config in losses]
    return [RecipeError(f"{m.name}: {p[0]}", p[1]) for (m, _), p in zip(losses, found, strict=True) if p is not None]


def _check_labels(samples: Samples, mind: Anatomy) -> None:
    labels = samples.labels
    if labels is None or mind.classes is None:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= mind.classes:
        raise RecipeError(
            f"labels go from {low} to {high}, the student has {mind.classes} classes", "check data.labels"
        )


def resolved_precision(precision: str) -> str:
    """bf16 where `auto` finds a processor that multiplies bfloat16 in hardware, else fp32.

    Told by the instruction set alone, not by timing, so that equal runs on one machine are equal.
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def _keeps_zeros(training: Training, student: Checkpoint) -> bool:
    if isinstance(training.keep_zeros, bool):
        return training.keep_zeros
    return any(step.get("command") == "prune" for step in student.manifest.lineage)


def _cached(
    training: Training, losses: Losses, teacher: tuple[Runner, Anatomy], samples: Samples, division: Division
) -> bool:
    """Whether the teacher's outputs are computed once: where asked for, or small and used more than once."""
    run, mind = teacher
    reads = Loss(losses).reads
    length = next(iter(samples.columns.values())).shape[-1]
    size = run.output_bytes(reads, mind, length)
    if training.cache is True and size is None:
        raise RecipeError("hidden states and masked logits are too large to cache", "training.cache: auto")
    if isinstance(training.cache, bool) or size is None:
        return training.cache is True
    used = len(division.used(training.steps))
    repeated = training.steps * training.batch > used
    return repeated and size * (used + len(division.held_out)) <= CACHE_BYTES


def _parameters(student: Checkpoint, layers: Sequence[LayerInfo]) -> dict[str, Planned]:
    """Every parameter in the form it has."""
    infos: dict[str, LayerInfo] = {}
    for info in layers:
        infos.setdefault(info.tensor, info)
    return {
        name: Planned(spec, stored_outline(student, name), infos.get(name))
        for name, spec in student.parameters().items()
    }


def _tokenizer_warnings(student: Checkpoint, teacher: Checkpoint) -> list[str]:
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


def _module(checkpoint: Checkpoint, recipe: DistillRecipe, allow_code: bool) -> nn.Module | None:
    if checkpoint.config is not None or recipe.model is None:
        return None
    from aicompress.model.loading.chain import module_for

    return module_for(checkpoint.path, recipe.model, allow_code)


def with_all_digests(output: Output, student: Mapping[str, str], teacher: Mapping[str, str]) -> Output:
    """The output with the real digests of both inputs in its lineage; no length changes."""
    final = with_digests(output, student)
    *earlier, step = final.manifest.lineage
    lineage = (*earlier, {**step, "teacher": {"inputs": dict(teacher)}})
    return replace(final, manifest=replace(final.manifest, lineage=lineage))
