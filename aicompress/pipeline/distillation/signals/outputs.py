"""What of a teacher's outputs is stored for every sample, and which losses and runs can learn from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.place import require_apart
from aicompress.checkpoint.reader import digests
from aicompress.disk import require_writable
from aicompress.errors import CompressError, OutOfSpace, RecipeError, Refused, raise_all
from aicompress.methods.distill.logits import SoftenedConfig
from aicompress.methods.distill.signals import Form, position_bytes, words
from aicompress.methods.outputs import Output, OutputShapes
from aicompress.model.distillation.outputs import Runner
from aicompress.model.loading.pooling import Pooling
from aicompress.model.loading.tokenizer import vocabulary_digest
from aicompress.pipeline.distillation.compatibility import Losses
from aicompress.pipeline.distillation.data.samples import TrainingSamples
from aicompress.pipeline.distillation.signals.folder import SignalFolder, Told, require_place
from aicompress.pipeline.distillation.teachers.teacher import Loss
from aicompress.pipeline.step.checks import room_for
from aicompress.recipe.distillation import DistillRecipe

STORED: frozenset[Output] = frozenset({"logits", "embedding"})
TEACHER = ("teacher", "setting")
DIFFERENT = {
    "teacher": ("another teacher", "give the teacher that it was made of, or another folder"),
    "setting": ("another configuration of the teacher", "give config, adapters and pooling as they were"),
    "task": ("another kind of model", "give the teacher that it was made of, or another folder"),
    "tokenizer": ("another tokenizer", "the student needs the tokenizer that the samples were made with"),
    "source": ("another text", "give the data that it was made of, or another folder"),
    "samples": ("other samples, or of another order", "give the `data` that it was made of, or another folder"),
    "form": ("another form", "give the `signals` that it was made with, or another folder"),
    "k": ("another k", "give the `signals` that it was made with, or another folder"),
    "temperature": ("another temperature", "give the temperature that it was made for, or another folder"),
    "seed": ("another seed", "give the seed that it was made with, or another folder"),
    "outputs": ("other outputs", "give losses that read the same outputs, or another folder"),
}


@dataclass(frozen=True)
class Taught:
    """What is known of the teachers before they run: of checkpoints, or of a folder where their outputs are stored.

    Attributes:
        checkpoints: the teachers; none where only their outputs are there.
        runs, all_shapes: of each; the classes of one that numbers the student's tokens otherwise are the student's.
        numbers: of each, those that it gives the student's tokens; None where they are the student's own.
        folder: that of the outputs, where there are no checkpoints.
    """

    checkpoints: tuple[Checkpoint, ...]
    runs: tuple[Runner, ...]
    all_shapes: tuple[OutputShapes, ...]
    numbers: tuple[Tensor | None, ...]
    folder: SignalFolder | None = None

    def identity(self, recipe: DistillRecipe) -> dict[str, Any]:
        """What decides the outputs: digests of the teachers' weights, and one of all else."""
        if self.folder is not None:
            return {name: self.folder.told[name] for name in TEACHER}
        adapters = [digests(source) for each in self.checkpoints for source in each.foreign.beside.values()]
        merged = [[*each.foreign.merged, each.config] for each in self.checkpoints]
        model = None if recipe.model is None else recipe.model.model_dump(mode="json")
        setting = json.dumps([adapters, merged, model, [str(run.pooling) for run in self.runs]], sort_keys=True)
        digest = hashlib.sha256(setting.encode()).hexdigest()
        return {"teacher": [digests(each.source) for each in self.checkpoints], "setting": digest}

    @classmethod
    def of_folder(cls, folder: SignalFolder) -> Taught:
        """The teacher whose outputs a folder holds."""
        told = folder.told
        shapes = OutputShapes(classes=told["classes"], tokenizer=told["vocabulary_sha256"], embedding=told["embedding"])
        return cls((), (Runner(told["task"], Pooling()),), (shapes,), (None,), folder)


@dataclass(frozen=True)
class StoredOutputs:
    """What of a teacher's outputs is stored, and where.

    Attributes:
        path: the folder.
        told: what they are of, JSON-ready.
        form: of the logits; None where no loss reads them.
        reads: outputs that the losses need.
        positions: positions of logits in all samples.
        nbytes: of all of it.
        chosen: the recipe leaves the temperature open.
        folder: what was there when the run was planned; None where it is to be made.
    """

    path: Path
    told: Told
    form: Form | None
    reads: frozenset[Output]
    positions: int
    nbytes: int
    chosen: bool
    folder: SignalFolder | None

    @property
    def words(self) -> str:
        """What is stored, for people."""
        told = self.told
        parts = [] if self.form is None else [words(self.form, told["k"], told["classes"])]
        parts += [f"embeddings {told['embedding']} wide"] if "embedding" in self.reads else []
        softened = f" at temperature {told['temperature']:g}" if told["temperature"] is not None else ""
        return " and ".join(parts) + softened

    @property
    def unit(self) -> str:
        """What the bytes are counted by."""
        return "token" if self.told["task"] in ("causal", "masked") else "sample"

    @property
    def note(self) -> str:
        """What a plan and a report say of it."""
        does = "is made there" if self.folder is None else "is read from there, and no teacher is loaded"
        each = self.nbytes / max(1, self.positions)
        return f"teacher: {self.words}, {each:,.0f} bytes a {self.unit}, {self.nbytes:,} in {self.path}: {does}"

    def lineage(self, given: bool) -> dict[str, Any]:
        """What the lineage says of it, with the teacher's digests where no teacher is given."""
        teachers = enumerate(self.told["teacher"], start=1)
        named = {f"teacher_{number}" if number > 1 else "teacher": {"inputs": files} for number, files in teachers}
        return {"signals": self.settings, **({} if given else named)}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides how good the stored outputs are."""
        settings = {name: self.told[name] for name in ("form", "k", "temperature", "seed", "outputs")}
        return {**settings, "temperature": "auto"} if self.chosen else settings

    def at_temperature(self, temperature: float) -> StoredOutputs:
        """The same for a temperature that was chosen; all logits are stored as they are for every one."""
        told = self.told if self.form in (None, "every") else {**self.told, "temperature": temperature}
        return replace(self, told=told)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the outputs that are read, beside the recipe."""
        return {name: value for name, value in self.told.items() if name != "temperature"}

    def summary(self) -> dict[str, Any]:
        """What the report says of it."""
        each = self.nbytes / max(1, self.positions)
        made = {"bytes": self.nbytes, f"bytes_per_{self.unit}": each, "made": self.folder is None}
        return {"stored": self.words, "folder": self.path.name, **made}


def opened(path: Path | None, recipe: DistillRecipe) -> SignalFolder | None:
    """The folder of stored outputs, where it is there already.

    Raises:
        Refused: the place is taken by something else, or there is no use for it.
    """
    if path is None:
        if recipe.signals is not None:
            raise RecipeError("signals: says how a teacher's outputs are stored, and no place is given", GIVE)
        return None
    if recipe.mean_teacher is not None:
        raise Refused(
            "a mean teacher changes with every step: its outputs cannot be stored", "leave --cache-teacher out"
        )
    if recipe.training.cache is True:
        raise Refused("training.cache: the teacher's outputs are in --cache-teacher", "leave one of the two out")
    require_place(path)
    require_writable(path)
    return SignalFolder.open(path) if path.is_dir() and any(path.iterdir()) else None


GIVE = "give --cache-teacher DIR, or leave `signals` out"


def planned(
    place: tuple[Path, SignalFolder | None], recipe: DistillRecipe, losses: Losses, samples: TrainingSamples,
    taught: Taught, student: Checkpoint,
) -> StoredOutputs:  # fmt: skip
    """What is stored, or is there already and fits.

    Raises:
        Refused: or Problems: a loss cannot learn from it, or the folder is of something else.
    """
    path, folder = place
    reads, shapes = Loss(losses).reads, taught.all_shapes[0]
    classes = min((each.classes for each in taught.all_shapes if each.classes is not None), default=0)
    settings = recipe.stored
    form: Form | None = None
    if "logits" in reads:
        form = "every" if settings.k >= classes else settings.form
    raise_all(_unfit(losses, form))
    whole = form in (None, "every")
    temperature = None if whole else _temperature(losses)
    if temperature is None and not whole and folder is not None:
        temperature = folder.told["temperature"]  # the one that was chosen when it was made
    told = {
        **taught.identity(recipe),
        "task": taught.runs[0].task,
        "classes": classes,
        "vocabulary_sha256": shapes.tokenizer,
        "embedding": shapes.embedding,
        "form": form,
        "k": None if whole else settings.k,
        "temperature": temperature,
        "seed": recipe.seed if form == "drawn" else None,
        "outputs": sorted(reads),
        "tokenizer": vocabulary_digest(student.source.folder),
        "source": samples.source.sha256,
        "samples": samples.sha256,
    }  # fmt: skip
    if folder is not None:
        _require_same(folder, told)
    positions = taught.runs[0].positions(samples.columns)
    each = position_bytes(form, classes, settings.k) if form is not None else 0
    width = 4 * (shapes.embedding or 0) if "embedding" in reads else 0
    nbytes = each * int(positions.sum()) + (width + 4) * len(samples)
    if folder is None and nbytes > room_for(path)[1]:
        raise OutOfSpace(f"the teacher's outputs take {nbytes:,} bytes, and {path} has no room", "a smaller signals.k")
    return StoredOutputs(
        path,
        told,
        form,
        reads,
        int(positions.sum()),
        folder.nbytes if folder else nbytes,
        Loss(losses).leaves_open,
        folder,
    )


def _unfit(losses: Losses, form: Form | None) -> list[CompressError]:
    """What keeps losses from learning from stored outputs."""
    for method, _ in losses:
        inner = sorted(method.reads - STORED)
        if inner:
            told = f"{method.name} reads {' and '.join(inner)} of the teacher, which --cache-teacher does not store"
            return [RecipeError(told, "take losses on logits or embeddings, or leave --cache-teacher out")]
        if "logits" in method.reads and form != "every" and form not in method.stored:
            others = {"top": "compares every logit", "drawn": "would be biased by draws"}[form or "top"]
            hint = "a signals.k of all classes" + (", or form: top" if "top" in method.stored else "") + ", or kl"
            return [RecipeError(f"{method.name} {others}, and the stored form is {form}", hint)]
    soft = {config.temperature for _, config in losses if isinstance(config, SoftenedConfig)}
    if form in (None, "every"):
        return []
    if any(isinstance(temperature, tuple) for temperature in soft):
        return [RecipeError("a temperature that changes needs every logit of the teacher", "give one temperature")]
    if len(soft) > 1:
        return [RecipeError("losses of unlike temperatures need every logit of the teacher", "give them one")]
    return []


def _temperature(losses: Losses) -> float | None:
    """The temperature that all losses have; None where it is chosen when the outputs are stored."""
    soft = (config for _, config in losses if isinstance(config, SoftenedConfig) and not config.leaves_open)
    return next((config.softness for config in soft), None)


def _require_same(folder: SignalFolder, told: Told) -> None:
    """Refuse a folder of something else.

    Raises:
        Refused: naming what differs.
    """
    for name, (what, hint) in DIFFERENT.items():
        held = folder.told.get(name)
        if held != told[name]:
            short = isinstance(held, int | float) or name in ("form", "outputs", "task")
            detail = f": {held}, not {told[name]}" if short else ""
            raise Refused(f"{folder.path} holds the outputs for {what}{detail}", hint)


def require_apart_from(path: Path, checkpoints: list[Checkpoint], out: Path) -> None:
    """Refuse a folder inside an input or the output.

    Raises:
        Refused: it is, or holds one.
    """
    for checkpoint in checkpoints:
        require_apart(checkpoint.source, path)
    one, other = path.resolve(), out.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise Refused(f"--cache-teacher {path} and OUT lie in one another", "choose another folder")
