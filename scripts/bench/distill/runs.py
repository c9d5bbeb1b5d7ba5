"""One training and one evaluation of the comparison of distillation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROBE = 4  # steps that tell how many fit into the minutes


@dataclass(frozen=True)
class Given:
    """What is given to measure on.

    Attributes:
        folder: of everything that is written.
        model, train, text: a language model, what it learns from, and held-out text.
        encoder, sentences, pairs: a sentence encoder, lines, and scored pairs of sentences.
        data: images with labels.
        windows: of the held-out text.
        samples: that compressed models are calibrated on.
    """

    folder: Path
    model: Path | None
    train: Path | None
    text: Path | None
    encoder: Path | None
    sentences: Path | None
    pairs: Path | None
    data: Path | None
    windows: int
    samples: int


@dataclass(frozen=True)
class Budget:
    """How long a row may train.

    Attributes:
        minutes: of training alone.
        seed: of everything that is drawn.
    """

    minutes: float
    seed: int


def distilled(
    given: Given, source: Path, sections: Mapping[str, Any], budget: Budget, out: str, cache: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """Train a student for the minutes; where it lies, and the training section of its report.

    Args:
        source: IN, which is the teacher where the sections make a student and name no other in `teacher`.
        sections: of the recipe; `steps` in `training` is filled in where it is absent, and in `mode` where blocks are
            tuned one after another.
        out: name of the output.
        cache: folder of stored outputs.
    """
    from aicompress.pipeline.distillation.made_student import made_student
    from aicompress.pipeline.distillation.plan import make_plan
    from aicompress.pipeline.distillation.run import run
    from aicompress.pipeline.step.options import Options
    from aicompress.pipeline.step.output import Destination
    from aicompress.recipe.distillation import load

    plain = {"version": 1, "seed": budget.seed, "report": {"html": False}, **sections}
    teacher = plain.pop("teacher", None)
    place, file = given.folder / out, given.folder / f"{out.partition('.')[0]}.yaml"
    by_blocks = isinstance(plain.get("mode"), Mapping) and plain["mode"]["name"] == "blocks"

    def once(steps: int) -> dict[str, Any]:
        shutil.rmtree(place, ignore_errors=True)
        every = {"steps": steps, "evaluate_every": max(1, steps // 10)}
        filled = {**plain, "training": {**every, **plain["training"]}}
        if by_blocks:
            filled["mode"] = {**plain["mode"], "steps": steps}
        file.write_text(json.dumps(filled), encoding="utf-8")
        recipe, destination = load(str(file)), Destination(place, overwrite=True)
        with made_student(source, destination, recipe) as made:
            learned_from = teacher or (source if made is not None else None)
            plan = make_plan(made or source, learned_from, destination, recipe, cache=cache)
            return dict(run(plan, Options(latency="off")).training)

    if "steps" in plain["training"]:
        return place, once(plain["training"]["steps"])
    if by_blocks:
        few, more = (once(steps)["seconds"] for steps in (PROBE, 4 * PROBE))  # both run all samples forward, too
        return place, once(max(PROBE, round(PROBE + (budget.minutes * 60 - few) * 3 * PROBE / (more - few))))
    rate = once(PROBE)["samples_per_second"] / plain["training"]["batch"]
    return place, once(max(PROBE, round(budget.minutes * 60 * rate)))


def evaluated(given: Given, path: Path, sections: Mapping[str, Any], against: Path | None = None) -> dict[str, Any]:
    """What `aicompress eval` measures: its report's quality, and the latency's."""
    from aicompress.pipeline.evaluation.run import evaluate
    from aicompress.recipe.evaluation import load

    file = given.folder / "eval.yaml"
    file.write_text(json.dumps({"version": 1, "kernels": "reference", **sections}), encoding="utf-8")
    report = evaluate(str(path), [] if against is None else [str(against)], load(str(file)))
    return {**report.quality, "latency": report.latency}
