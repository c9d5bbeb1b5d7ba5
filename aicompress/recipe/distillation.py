"""Recipes of `distill`: which losses, on which data, and how long to train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from aicompress.data.section import Data
from aicompress.errors import RecipeError
from aicompress.methods.distill.modes import full
from aicompress.methods.losses import LossConfig, get_loss
from aicompress.methods.modes import ModeConfig, get_mode
from aicompress.recipe.files import folder_of, read
from aicompress.recipe.section import Model, ReportFiles, Section, StoredCodes, optional, validated
from aicompress.recipe.student import Rounds, StudentShape


class Training(Section):
    """How the student is trained: AdamW, linear warm-up, cosine decay to zero."""

    steps: int = Field(500, ge=1, description="optimizer steps")
    batch: int = Field(32, ge=1, description="samples in a step, over all processes")
    accumulate: int = Field(1, ge=1, description="parts that a step's batch is computed in, to save memory")
    batch_tokens: int | None = optional(
        "tokens in a step at most, padding counted; a step then takes as many samples of like length as "
        "fit, and `batch` is that of the held-out ones",
        ge=1,
    )
    activation_checkpointing: bool = optional(
        "keep no activations inside blocks but compute them again on the way back: less memory, a third more time",
        False,
    )
    shard: bool = optional(
        "under torchrun: divide weights, gradients and moments over the processes, and the teacher's weights, instead "
        "of keeping a copy in each; one process has nothing to divide",
        False,
    )
    learning_rate: float = Field(3e-4, gt=0, description="peak; a scale's is multiplied by the scale's own size")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising rate")
    weight_decay: float = Field(0.01, ge=0, description="of matrices; biases, norms and scales are not decayed")
    clip: float | None = Field(1.0, gt=0, description="longest gradient; none does not clip")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of forward and backward passes; weights stay fp32. auto: bf16 where the processor has it"
    )
    evaluate_every: int = Field(100, ge=1, description="steps between measurements of the held-out loss")
    patience: int | None = optional(
        "training ends after so many measurements of the held-out loss in a row that are no better than "
        "the best; none takes all steps",
        ge=1,
    )
    held_out: float = Field(0.05, gt=0, lt=1, description="share of the samples that is never trained on")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of a moving average of the weights, which is kept")
    keep_zeros: Literal["auto"] | bool = Field(
        "auto", description="weights that are exactly zero stay zero; auto: where an earlier step pruned"
    )
    cache: Literal["auto"] | bool = Field(
        "auto",
        description="compute the teacher's outputs once; auto: those for samples that repeat, the held-out ones at "
        "least, where 512 MiB hold them",
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch {self.batch}")
        return self


class MeanTeacher(Section):
    """The teacher is the exponential average of the student's own weights, which is what is saved."""

    decay: float = Field(0.99, gt=0, lt=1, description="of the average; less in the first steps, while it is young")
    dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of every layer's inputs that is dropped in training, of each of the two anew",
    )
    noise: float = Field(0.0, ge=0, description="standard deviation of what is added to arrays of real numbers")
    labelled: float = Field(
        0.25, gt=0, lt=1, description="share of every batch that has labels, where some samples have none (-1)"
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.dropout or self.noise):
            raise ValueError("one of dropout and noise must be above 0: the two would see the same")
        return self


class Signals(Section):
    """What of a teacher's logits --cache-teacher stores; embeddings are stored whole."""

    form: Literal["top", "drawn"] = Field(
        "top",
        description="top: the k most likely classes, and what the others have together; drawn: k classes drawn by "
        "their probabilities, from which kl learns without bias, in half the bytes",
    )
    k: int = Field(64, ge=1, description="classes of a position that are stored; as many as there are store all logits")


class DistillRecipe(StoredCodes):
    """A recipe of distill."""

    version: Literal[1]
    method: SerializeAsAny[LossConfig]
    also: tuple[SerializeAsAny[LossConfig], ...] = Field((), description="more losses, each with its weight")
    mode: SerializeAsAny[ModeConfig] = optional(
        "what of the student moves, by the name of a mode or as its parameters", full.Config()
    )
    student: StudentShape | None = optional(
        "make the student out of IN, which is the teacher where no other one is given"
    )
    iterate: Rounds | None = optional(
        "prune and train in turn: [0.3, 0.5, 0.7] are the shares of zeros after each round; `training` is "
        "that of each round. IN is the teacher where no other one is given"
    )
    mean_teacher: MeanTeacher | None = optional(
        "learn from true labels, and from the average of the student itself: there is no other teacher"
    )
    signals: Signals | None = optional(
        "how --cache-teacher stores the teacher's logits; none means the 64 most likely classes"
    )
    model: Model | None = None
    data: Data
    training: Training = Training()
    seed: int = Field(0, ge=0)
    gates: tuple[str, ...] = ()
    report: ReportFiles = Field(ReportFiles(), exclude=True, description="how the report is written; not hashed")

    @model_validator(mode="after")
    def _one_average(self) -> Self:
        if self.mean_teacher is not None and self.training.ema is not None:
            raise ValueError("training.ema and mean_teacher.decay are one thing: leave training.ema out")
        if self.mean_teacher is not None and any(loss.leaves_open for loss in self.losses):
            raise ValueError("temperature: auto is chosen by a teacher that stays: give a number to a mean teacher's")
        if self.mean_teacher is not None and self.training.cache is True:
            raise ValueError("training.cache: a mean teacher changes with every step: leave it out")
        if self.mean_teacher is not None and self.training.activation_checkpointing:
            raise ValueError(
                "training.activation_checkpointing: a mean teacher's dropout would be drawn anew: leave it out"
            )
        if self.mean_teacher is not None and self.training.batch_tokens is not None:
            raise ValueError("training.batch_tokens: a mean teacher's batches have a share of labels: give batch alone")
        return self

    @model_validator(mode="after")
    def _one_way_to_a_student(self) -> Self:
        if self.iterate is not None and (self.student is not None or self.mean_teacher is not None):
            raise ValueError("iterate prunes IN itself, with a teacher that stays: leave out student and mean_teacher")
        if self.iterate is not None:
            for sparsity in self.iterate.sparsity:
                self.iterate.method(sparsity)
        return self

    @property
    def stored(self) -> Signals:
        """How a teacher's logits are stored."""
        return self.signals or Signals()

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        """Every term of the sum."""
        return (self.method, *self.also)


def load(name: str, overrides: Sequence[str] = ()) -> DistillRecipe:
    """Read and validate a recipe of distill.

    Raises:
        RecipeError, Problems: what is wrong, with hints.
    """
    plain, path = read(name, "distill", overrides)
    losses = {"method": _loss(plain.get("method"), "method", path.name)}
    also = plain.get("also", [])
    if not isinstance(also, list):
        raise RecipeError(f"{path.name}: also is not a list", "also: [{name: hidden, weight: 0.5}]")
    terms = [_loss(term, f"also[{number}]", path.name) for number, term in enumerate(also)]
    parts = {**losses, "also": terms, "mode": _mode(plain.get("mode", full.Config().name), path.name)}
    return validated(DistillRecipe, {**plain, **parts}, "").relative_to(folder_of(path))


def _mode(given: Any, file: str) -> ModeConfig:
    plain = {"name": given} if isinstance(given, str) else given
    if not isinstance(plain, dict) or "name" not in plain:
        raise RecipeError(f"{file}: mode is neither a name nor parameters with one", "mode: scales")
    config: ModeConfig = validated(get_mode(str(plain["name"])).config, plain, "mode")
    return config


def _loss(plain: Any, where: str, file: str) -> LossConfig:
    if not isinstance(plain, dict) or "name" not in plain:
        raise RecipeError(f"{file}: {where}.name is missing", "see `aicompress methods distill`")
    config: LossConfig = validated(get_loss(str(plain["name"])).config, plain, where)
    return config
