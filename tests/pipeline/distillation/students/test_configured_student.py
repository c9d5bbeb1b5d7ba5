"""Students of a configuration of their own: what they start with, what is said of it, and who reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError, RecipeError
from aicompress.pipeline.distillation.made_student import made_student
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.run import run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import DistillRecipe, load
from aicompress.report.model import Report


def recipe(folder: Path, text: Path, config: dict[str, Any], steps: int = 2, **sections: Any) -> DistillRecipe:
    (folder / "small.json").write_text(json.dumps(config))
    settings = {"steps": steps, "batch": 4, "evaluate_every": 2, "learning_rate": 2e-3, "precision": "fp32"}
    data = {"text": str(text), "length": 16, "samples": 40}
    plain = {"version": 1, "method": {"name": "kl"}, "student": {"config": "small.json"}, "data": data, **sections}
    (folder / "recipe.yaml").write_text(json.dumps({**plain, "training": settings}))
    return load(str(folder / "recipe.yaml"))


def distil(source: Path, out: Path, made: DistillRecipe, plan_only: bool = False, **options: Any) -> Report:
    with made_student(source, Destination(out), made, plan_only=plan_only) as student:
        return run(make_plan(student or source, source, Destination(out), made), Options(latency="off", **options))


def smaller(source: Path, **fields: Any) -> dict[str, Any]:
    return {**json.loads((source / "config.json").read_text()), **fields}


def test_what_fits_is_copied_and_plain_transformers_loads_it(
    trained_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    asked = recipe(tmp_path, text_file, smaller(trained_llama, num_hidden_layers=2, intermediate_size=48))
    with made_student(trained_llama, Destination(tmp_path / "out"), asked, plan_only=True) as student:
        assert student is not None
        start = Checkpoint.open(student.path)
        teacher = Checkpoint.open(trained_llama)
        for name, spec in start.parameters().items():
            assert start.read(name).equal(teacher.read(name)) == (teacher.parameters()[name].shape == spec.shape), name
        whole = sum(start.read(name).numel() for name in start.parameters())
        plan = make_plan(student, trained_llama, Destination(tmp_path / "out"), asked)
        summary, report = plan.summary(), run(plan, Options(latency="off"))
    (told,) = (note for note in summary.notes if note.startswith("student: "))
    mlp = 2 * 3 * 64 * 48
    assert told == (
        f"student: a LlamaForCausalLM of small.json, {whole - mlp:,} of its {whole:,} numbers copied from IN, "
        "the others drawn"
    )
    assert told in report.notes
    assert report.before is not None
    assert report.before.path == str(trained_llama)
    assert [step["command"] for step in Checkpoint.open(tmp_path / "out").manifest.lineage] == ["student", "distill"]
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (2, 48)
    assert not torch.isnan(model(torch.tensor([[1, 2, 3]])).logits).any()
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"]
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "small.json", "out"}


def test_a_student_wider_than_its_teacher_and_one_of_another_architecture(
    trained_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    wider = smaller(trained_llama, hidden_size=80, num_attention_heads=5, num_key_value_heads=1, head_dim=16)
    report = distil(trained_llama, tmp_path / "wide", recipe(tmp_path, text_file, wider))
    assert report.size_ratio is not None
    assert report.size_ratio > 1
    assert report.training["held_out_after"] <= report.training["held_out_before"]
    other = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 256, "n_embd": 32, "n_layer": 1}
    report = distil(trained_llama, tmp_path / "gpt2", recipe(tmp_path, text_file, {**other, "n_head": 2}))
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2").config.model_type == "gpt2"
    assert any("a GPT2LMHeadModel of small.json, 0 of its" in note for note in report.notes)


def test_the_seed_draws_the_rest(trained_llama: Path, text_file: Path, tmp_path: Path) -> None:
    config, starts = smaller(trained_llama, intermediate_size=32), []
    for seed in (0, 0, 1):
        asked = recipe(tmp_path, text_file, config, seed=seed)
        with made_student(trained_llama, Destination(tmp_path / "out"), asked, plan_only=True) as student:
            assert student is not None
            starts.append(Checkpoint.open(student.path).read("model.layers.0.mlp.up_proj.weight"))
    assert starts[0].equal(starts[1])
    assert not starts[0].equal(starts[2])


def test_a_config_that_changed_is_not_resumed(trained_llama: Path, text_file: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("loss"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(trained_llama, tmp_path / "out", recipe(tmp_path, text_file, smaller(trained_llama)), progress=stop)
    changed = recipe(tmp_path, text_file, smaller(trained_llama, rms_norm_eps=1e-3))
    with pytest.raises(CompressError, match="another input, recipe or version"):
        distil(trained_llama, tmp_path / "out", changed, resume=True)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"vocab_size": 100}, "100 tokens, and IN's tokenizer has 2"),
        ({"hidden_size": 7}, "student.config: config.json does not describe a LlamaForCausalLM"),
        ({"model_type": "mystery", "architectures": ["Mystery"]}, "does not know the architecture 'Mystery'"),
    ],
)
def test_configs_that_fit_nothing(
    trained_llama: Path, text_file: Path, tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(CompressError, match=told) as caught:
        distil(trained_llama, tmp_path / "out", recipe(tmp_path, text_file, smaller(trained_llama, **fields)))
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "small.json"}


def test_a_config_says_the_whole_shape(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="config says the whole shape"):
        recipe(tmp_path, text_file, {}, student={"config": "small.json", "layers": 2})
    asked = recipe(tmp_path, text_file, {})
    assert asked.student is not None
    assert asked.student.config == str(tmp_path / "small.json")
    assert asked.resolved()["student"]["config"] == "small.json"
