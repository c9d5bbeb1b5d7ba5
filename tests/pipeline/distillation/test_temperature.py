"""A temperature that a recipe leaves open: what it is chosen on, and that the student starts as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError
from aicompress.pipeline.distillation import temperature
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.run import TrainingOptions, run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import DistillRecipe, load

OFF = Options(latency="off")


def recipe(folder: Path, text: Path, method: dict[str, Any], **sections: Any) -> DistillRecipe:
    settings = {"steps": 3, "batch": 4, "evaluate_every": 3, "held_out": 0.4, "precision": "fp32"}
    data = {"text": str(text), "length": 16, "samples": 20}
    plain = {"version": 1, "method": method, "data": data, "training": settings, **sections}
    (folder / "recipe.yaml").write_text(json.dumps(plain))
    return load(str(folder / "recipe.yaml"))


def test_the_best_of_a_few_steps_is_taken(
    tiny_llama: Path, trained_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temperature, "CANDIDATES", (1.0, 4.0))
    monkeypatch.setattr(temperature, "STEPS", 3)
    asked = recipe(tmp_path, text_file, {"name": "kl", "temperature": "auto"}, also=[{"name": "jsd", "temperature": 2}])
    plan = make_plan(tiny_llama, trained_llama, Destination(tmp_path / "out"), asked)
    told = "temperature: of 1, 4 the one that comes closest to the teacher in 3 steps, on 2 of the 8 held-out samples"
    assert told in plan.summary().notes
    assert set(temperature.judged(plan.split).tolist()) < set(plan.split.held_out.tolist())
    report = run(plan, OFF)
    chosen = report.training["temperature"]
    losses = chosen["held_out_by_temperature"]
    assert set(losses) == {"1", "4"}
    assert losses[f"{chosen['value']:g}"] == min(losses.values())
    assert any(f"{chosen['value']:g} was chosen on 2 held-out samples" in note for note in report.notes)
    given = recipe(
        tmp_path, text_file, {"name": "kl", "temperature": chosen["value"]}, also=[asked.also[0].model_dump()]
    )
    by_hand = run(make_plan(tiny_llama, trained_llama, Destination(tmp_path / "by-hand"), given), OFF)
    assert report.training["curve"] == by_hand.training["curve"]
    one, other = (Checkpoint.open(tmp_path / name) for name in ("out", "by-hand"))
    assert all(one.read(name).equal(other.read(name)) for name in one.tensors)
    told: list[str] = []

    def stop(what: str, done: int, total: int) -> None:
        told.append(what)
        if what.startswith("loss"):
            raise KeyboardInterrupt

    again = make_plan(tiny_llama, trained_llama, Destination(tmp_path / "again"), asked)
    with pytest.raises(KeyboardInterrupt):
        run(again, Options(latency="off", progress=stop), TrainingOptions(save_seconds=0))
    assert "temperature" in told
    told.clear()
    resumed = run(again, Options(True, "off", lambda what, done, total: told.append(what)))
    assert "temperature" not in told
    assert resumed.training["temperature"] == chosen
    assert {*resumed.notes} == {*report.notes}
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_stored_outputs_keep_the_one_they_were_made_for(
    tiny_llama: Path, trained_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temperature, "CANDIDATES", (2.0,))
    monkeypatch.setattr(temperature, "STEPS", 1)
    asked = recipe(tmp_path, text_file, {"name": "kl", "temperature": "auto"}, signals={"k": 8})
    for name, teacher in (("first", trained_llama), ("second", None)):
        plan = make_plan(tiny_llama, teacher, Destination(tmp_path / name), asked, cache=tmp_path / "cache")
        report = run(plan, OFF)
        assert report.training["temperature"]["value"] == 2.0
        assert "at temperature 2" in report.training["signals"]["stored"]
        assert report.training["signals"]["made"] == (name == "first")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_what_has_no_temperature_to_choose(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(RecipeError, match="a teacher that stays"):
        recipe(tmp_path, text_file, {"name": "kl", "temperature": "auto"}, mean_teacher={})
    with pytest.raises(RecipeError, match="or auto"):
        recipe(tmp_path, text_file, {"name": "kl", "temperature": "warm"})
