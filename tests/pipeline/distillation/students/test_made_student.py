"""Students that a recipe makes out of the teacher: what is cut, planned, trained, recorded and left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from aicompress.checkpoint import Checkpoint
from aicompress.errors import OutputExists, RecipeError, Refused
from aicompress.model.loading.load import load as load_model
from aicompress.pipeline.distillation.made_student import made_student
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.run import TrainingOptions, run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.structured import planner
from aicompress.pipeline.structured import run as structured
from aicompress.recipe.distillation import DistillRecipe, load
from aicompress.report.model import Report

Make = Callable[..., DistillRecipe]


@pytest.fixture
def recipe(tmp_path: Path, text_file: Path) -> Make:
    """Recipes on the session's text, with a student section or without."""

    def make(student: dict[str, Any] | None, steps: int = 2) -> DistillRecipe:
        settings = {"steps": steps, "batch": 8, "evaluate_every": 2, "learning_rate": 2e-3, "precision": "fp32"}
        plain = {"version": 1, "method": {"name": "kl"}, "data": {"text": str(text_file), "length": 32}}
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({**plain, "training": settings, **({"student": student} if student else {})}))
        return load(str(path))

    return make


def distil(source: Path, out: Path, made: DistillRecipe, save_seconds: float = 60.0, **options: Any) -> Report:
    with made_student(source, Destination(out), made) as student:
        plan = make_plan(student or source, source, Destination(out), made)
        return run(plan, Options(**{"latency": "off", **options}), TrainingOptions(save_seconds))


def test_one_command_is_the_cut_and_the_distillation_by_hand(trained_llama: Path, recipe: Make, tmp_path: Path) -> None:
    asked = recipe({"layers": [0, 2]})
    report = distil(trained_llama, tmp_path / "out", asked)
    (cut,) = asked.student.cuts(asked.data, asked.seed) if asked.student else ()
    structured.run(planner.make_plan(trained_llama, Destination(tmp_path / "cut"), cut, "prune"))
    plain = recipe(None)
    plan = make_plan(tmp_path / "cut", trained_llama, Destination(tmp_path / "by-hand"), plain)
    by_hand = run(plan, Options(latency="off"))
    one, other = (Checkpoint.open(tmp_path / name) for name in ("out", "by-hand"))
    assert all(one.read(name).equal(other.read(name)) for name in other.tensors)
    assert one.manifest.lineage[0] == other.manifest.lineage[0]
    assert [step["command"] for step in one.manifest.lineage] == ["prune", "distill"]
    assert one.manifest.lineage[1]["inputs"] == other.manifest.lineage[1]["inputs"]
    assert one.manifest.lineage[1]["teacher"]["inputs"] == one.manifest.lineage[0]["inputs"]
    assert report.training["curve"] == by_hand.training["curve"]
    assert report.before is not None
    assert report.before.path == str(trained_llama)
    assert report.before.sha256 == one.manifest.lineage[0]["inputs"]
    assert "student: model.layers: dropped block 1 of 3" in report.notes
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "out", "cut", "by-hand"}


def test_a_narrow_student_is_planned_to_the_byte_and_loads_in_transformers(
    trained_llama: Path, recipe: Make, tmp_path: Path
) -> None:
    asked = recipe({"layers": 2, "width": 0.5, "heads": 0.5, "hidden": 40})
    with made_student(trained_llama, Destination(tmp_path / "out"), asked, plan_only=True) as student:
        assert student is not None
        plan = make_plan(student, trained_llama, Destination(tmp_path / "out"), asked)
        summary, report = plan.summary(), run(plan, Options(latency="off"))
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "out"}
    assert summary.source == str(trained_llama)
    assert summary.notes == (
        "student: model.layers: dropped block 1 of 3",
        "student: neurons 64 of 128",
        "student: hidden 40 of 64",
        "student: heads 1 of 2",
    )
    shapes = {row.name: row.detail["shape"] for row in summary.rows}
    assert shapes["model.layers.1.mlp.down_proj"] == "40 × 64"
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == summary.weight_bytes
    assert report.training["held_out_after"] < report.training["held_out_before"]
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        if f"{name.removesuffix('.weight')}" in shapes:
            assert " × ".join(map(str, tensor.shape)) == shapes[name.removesuffix(".weight")]
    config = model.config
    assert (config.num_hidden_layers, config.intermediate_size, config.hidden_size) == (2, 64, 40)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)


def test_kept_blocks_start_closer_to_the_teacher_than_new_ones(
    trained_llama: Path, shallow_llama: Path, recipe: Make, tmp_path: Path
) -> None:
    plain = recipe(None)
    random = run(make_plan(shallow_llama, trained_llama, Destination(tmp_path / "new"), plain), Options(latency="off"))
    made = distil(trained_llama, tmp_path / "made", recipe({"layers": 2}))
    assert made.training["held_out_before"] < 0.5 * random.training["held_out_after"]


def test_a_stopped_run_makes_the_student_again_and_goes_on(trained_llama: Path, recipe: Make, tmp_path: Path) -> None:
    asked = recipe({"layers": 0.4}, steps=4)  # of three

    def stop(what: str, done: int, total: int) -> None:
        if done == 2 and total == 4:
            raise KeyboardInterrupt

    distil(trained_llama, tmp_path / "whole", asked)
    with pytest.raises(KeyboardInterrupt):
        distil(trained_llama, tmp_path / "stopped", asked, save_seconds=0, progress=stop)
    steps: list[int] = []
    distil(trained_llama, tmp_path / "stopped", asked, resume=True, progress=lambda what, done, n: steps.append(done))
    assert steps == [3, 4]
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "stopped"))
    assert one.read_bytes() == other.read_bytes()


def test_a_recipe_without_a_student_keeps_its_digest(recipe: Make) -> None:
    assert "student" not in recipe(None).resolved()
    assert recipe({"layers": 2}).resolved()["student"]["layers"] == 2


def test_a_narrow_student_whose_heads_config_json_cannot_say(
    tiny_bert: Path, recipe: Make, tmp_path: Path, text_file: Path
) -> None:
    model = hf.BertForMaskedLM(hf.BertConfig.from_pretrained(tiny_bert))
    shutil.copytree(tiny_bert, tmp_path / "bert", ignore=shutil.ignore_patterns("modules.json", "1_Pooling"))
    model.save_pretrained(tmp_path / "bert")
    report = distil(tmp_path / "bert", tmp_path / "out", recipe({"width": 0.5, "heads": 0.5, "hidden": 0.5}))
    assert any("config.json cannot say" in told for told in report.warnings)
    assert "student: heads 2 of 4" in report.notes
    assert type(load_model(tmp_path / "out")).__name__ == "BertForMaskedLM"


class TestRefused:
    def test_before_it_is_cut(self, tiny_bert: Path, recipe: Make, tmp_path: Path) -> None:
        calls: list[str] = []
        told = made_student(
            tiny_bert, Destination(tmp_path / "out"), recipe({"width": 0.5}), lambda what, *counts: calls.append(what)
        )
        with pytest.raises(RecipeError, match="gives no logits"), told:
            pass
        assert not calls

    def test_what_cannot_be_cut_is_said_of_the_checkpoint_that_was_given(
        self, trained_llama: Path, recipe: Make, tmp_path: Path
    ) -> None:
        asked = recipe({"width": 0.5, "heads": 9})
        with (
            pytest.raises(Refused, match=r"student: .*heads") as refusal,
            made_student(trained_llama, Destination(tmp_path / "out"), asked),
        ):
            pass
        assert "-student" not in refusal.value.message

    """What cannot be cut is said in one line, and nothing is left."""

    @pytest.mark.parametrize(
        ("student", "message"),
        [
            ({"layers": 4}, "student: model.layers has 3 blocks: 4 cannot stay"),
            ({"layers": [0, 3]}, "student: method.keep: model.layers has no block 3"),
            ({"width": 500}, "student: method.intermediate_size is 500, but"),
        ],
    )
    def test_more_than_there_is(
        self, trained_llama: Path, recipe: Make, tmp_path: Path, student: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(RecipeError, match=message):
            distil(trained_llama, tmp_path / "new" / "out", recipe(student))
        assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}

    def test_a_taken_output(self, trained_llama: Path, recipe: Make, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(OutputExists):
            distil(trained_llama, tmp_path / "out", recipe({"layers": 2}))

    def test_a_bare_file(self, mlp_file: Path, recipe: Make, tmp_path: Path) -> None:
        with pytest.raises(Refused, match="names no architecture"):
            distil(mlp_file, tmp_path / "out.safetensors", recipe({"layers": 1}))
        assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}

    @pytest.mark.parametrize(
        ("student", "message"),
        [
            ({"layers": [2, 0]}, r"student\.layers: give how many blocks stay, a share of them, or a list"),
            ({"layers": 0}, r"student\.layers"),
            ({"width": 1.5}, r"student\.width: give a share between 0 and 1, or a whole number"),
            ({"score": "norm"}, "student: give one or more of layers, width, heads and hidden"),
        ],
    )
    def test_sections_that_say_nothing_sound(self, recipe: Make, student: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            recipe(student)
