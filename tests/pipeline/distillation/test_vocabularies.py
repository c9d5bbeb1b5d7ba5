"""Students and teachers whose tokens have other numbers, or that are other tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aicompress.pipeline.distillation.plan import DistillPlan, make_plan
from aicompress.pipeline.distillation.run import run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.structured import run as structured
from aicompress.recipe.distillation import load
from tests.pipeline.structured.units.test_vocabulary import made, plan

TOLD = "the teacher reads the student's {} tokens by its own numbers of them"


@pytest.fixture(scope="module")
def pruned(built: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A language model, and the same with fewer tokens."""
    whole, out = made("byte_level", built), tmp_path_factory.mktemp("pruned") / "out"
    structured.run(plan(whole, out, text_file, tokens=400), Options(latency="off"))
    return whole, out


def planned(
    student: Path, teacher: Path, folder: Path, text: Path, cache: Path | None = None, **own: Any
) -> DistillPlan:
    training = {"steps": 2, "batch": 4, "precision": "fp32", "learning_rate": 1e-3}
    data = {"text": str(text), "length": 24, "samples": 24}
    plain = {"version": 1, "method": {"name": "kl"}, "data": data, "training": training, **own}
    (folder / "recipe.json").write_text(json.dumps(plain))
    return make_plan(student, teacher, Destination(folder / "out"), load(str(folder / "recipe.json")), cache=cache)


@pytest.mark.parametrize("own", [{}, {"mode": {"name": "blocks", "steps": 1, "samples": 4}}, {"signals": {"k": 400}}])
def test_a_student_of_fewer_tokens_is_compared_over_those(
    pruned: tuple[Path, Path], text_file: Path, tmp_path: Path, own: dict[str, Any]
) -> None:
    whole, student = pruned
    cache = tmp_path / "cache" if "signals" in own else None
    asked = planned(student, whole, tmp_path, text_file, cache, **own)
    assert TOLD.format(400) in asked.summary().notes
    assert not any("tokenizers" in warning for warning in asked.warnings)
    report = run(asked, Options(latency="off"))
    assert report.training["held_out_before"] == pytest.approx(0, abs=1e-6)


def test_embeddings_of_a_student_of_fewer_tokens(built: Path, text_file: Path, tmp_path: Path) -> None:
    whole, student = made("word_piece", built), tmp_path / "student"
    structured.run(plan(whole, student, text_file), Options(latency="off"))
    report = run(planned(student, whole, tmp_path, text_file, method={"name": "mse"}), Options(latency="off"))
    assert report.training["held_out_before"] == pytest.approx(0, abs=1e-6)
