"""A student of another configuration: what fits is the teacher's, the rest is drawn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.json_text import parsed
from aicompress.errors import CheckpointError, RecipeError
from aicompress.model.distillation.drawn_student import drawn_model, save
from aicompress.model.loading.tokenizer import load_tokenizer
from aicompress.pipeline.step.checks import known_kinds
from aicompress.pipeline.step.options import Options, Progress
from aicompress.pipeline.step.output import Destination, Planned, arrange, lineage_step
from aicompress.pipeline.step.report import Results
from aicompress.pipeline.step.run import OpenOutput, StepRun, assembled, run_step, write_all
from aicompress.pipeline.step.workers import is_first
from aicompress.pipeline.structured.units.hidden import side_files
from aicompress.recipe.distillation import DistillRecipe

HINT = "give `student: {config: FILE}` the config.json of a model of transformers, or its folder"
INHERITED = ("architectures", "model_type")  # of IN, where the configuration does not name them


def read_config(path: Path, origin: Checkpoint) -> dict[str, Any]:
    """The configuration of a student, of the kind that IN is where it does not say.

    Raises:
        RecipeError: it cannot be read, or has too few tokens for IN's tokenizer.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        plain = parsed(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RecipeError(f"student.config: {file} cannot be read as JSON", HINT) from error
    if not isinstance(plain, dict):
        raise RecipeError(f"student.config: {file} is no configuration", HINT)
    given = {name: (origin.config or {})[name] for name in INHERITED if (origin.config or {}).get(name)}
    if plain.get("model_type", given.get("model_type")) != given.get("model_type"):
        given.pop("architectures", None)  # another architecture, which has to name its class
    config = {**given, **plain}
    config.pop("quantization_config", None)
    tokenizer, rows = load_tokenizer(origin.source.folder), config.get("vocab_size")
    if tokenizer is not None and isinstance(rows, int) and rows < len(tokenizer):
        told = f"student.config: {rows:,} tokens, and IN's tokenizer has {len(tokenizer):,}"
        raise RecipeError(told, "student and teacher share a tokenizer: give vocab_size at least as many")
    return config


def make(origin: Checkpoint, folder: Path, recipe: DistillRecipe, place: Path, progress: Progress) -> tuple[Path, str]:
    """Write a student of a configuration, as a step from IN: what IN has of the same name and shape is copied.

    Args:
        origin: IN.
        folder: where it goes, and what it is made of meanwhile.
        recipe: its seed draws the rest.
        place: of the student's configuration.
        progress: told of every parameter.

    Returns:
        The student, and what plan and report say of it.

    Raises:
        RecipeError: the configuration cannot be read, or describes no model that IN can teach.
    """
    new, made = folder / "drawn", folder / "configured"
    team = assembled(torch.device("cpu"))
    if is_first():
        _draw(read_config(place, origin), recipe.seed, new)
    team.wait()
    drawn = Checkpoint.open(new)
    specs, known = drawn.parameters(), origin.parameters()
    fits = {name for name, spec in specs.items() if name in known and known[name].shape == spec.shape}
    kinds, _ = known_kinds(drawn)
    infos = {info.tensor: info for info in drawn.layers(kinds)}
    parameters = {name: Planned(spec, info=infos.get(name)) for name, spec in specs.items()}
    ungated = recipe.model_copy(update={"gates": ()})  # they judge what is trained
    step = lineage_step("student", ungated, origin.source)
    output = arrange(origin, Destination(made, overwrite=True), parameters, step, drawn.config)
    output = replace(output, files=_side_files(origin, drawn))

    def value(name: str) -> Tensor:
        tensor: Tensor = (origin if name in fits else drawn).dense(name)
        return tensor.to(specs[name].dtype)

    def write(opened: OpenOutput) -> Results:
        write_all(output, opened.writer, lambda name: [(value(name), None)], progress)
        return Results()

    run_step(StepRun(origin, kinds, ungated, output, write), team, Options(latency="off"))
    sizes = {name: math.prod(spec.shape) for name, spec in specs.items()}
    copied, total = sum(sizes[name] for name in fits), sum(sizes.values())
    named = f"{(drawn.config or {})['architectures'][0]} of {place.name}"
    return made, f"student: a {named}, {copied:,} of its {total:,} numbers copied from IN, the others drawn"


def _draw(config: dict[str, Any], seed: int, folder: Path) -> None:
    """Save a model of a configuration.

    Raises:
        RecipeError: transformers does not take it.
    """
    try:
        model = drawn_model(config, seed)
    except CheckpointError as error:
        hint = "check its sizes against each other, and that transformers knows its architecture"
        raise RecipeError(f"student.config: {error.message}", hint) from error
    save(model, folder)


def _side_files(origin: Checkpoint, drawn: Checkpoint) -> dict[Path, bytes]:
    """Files beside the weights that say how wide the model is."""
    before, now = ((each.config or {}).get("hidden_size") for each in (origin, drawn))
    if not isinstance(before, int) or not isinstance(now, int) or before == now:
        return {}
    return side_files(origin, before, now)
