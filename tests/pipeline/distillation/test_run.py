"""Distillation end to end on small real models: every kind of student, every promise about the output."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError, OutputExists, RecipeError, Refused
from aicompress.model.loading.tokenizer import FILES
from aicompress.pipeline.distillation.data.samples import Batch
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.run import TrainingOptions, run
from aicompress.pipeline.distillation.teachers.teacher import Panel
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import DistillRecipe, load
from aicompress.report.model import Report
from tests import checkpoints
from tests.model.compressed import compress, halved, integers, low_rank

Make = Callable[..., DistillRecipe]


@pytest.fixture
def recipe(tmp_path: Path, text_file: Path) -> Make:
    """Recipes on the session's text: a method's fields, training fields, and whole sections."""

    def make(method: dict[str, Any], sections: dict[str, Any] | None = None, **training: Any) -> DistillRecipe:
        settings = {"steps": 8, "batch": 8, "evaluate_every": 4, "learning_rate": 2e-3, "precision": "fp32", **training}
        plain = {"version": 1, "method": method, "data": {"text": str(text_file), "length": 32}, "training": settings}
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({**plain, **(sections or {})}))
        return load(str(path))

    return make


def distil(
    student: Path, teacher: Path, out: Path, made: DistillRecipe, save_seconds: float = 60.0, **options: Any
) -> Report:
    plan = make_plan(student, teacher, Destination(out), made)
    report = run(plan, Options(**{"latency": "off", **options}), TrainingOptions(save_seconds))
    assert sum(file.stat().st_size for file in Checkpoint.open(out).source.files) == plan.output.weight_bytes
    return report


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_a_language_model_comes_closer_to_its_teacher(
    tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path
) -> None:
    report = distil(tiny_llama, trained_llama, tmp_path / "out", recipe({"name": "kl", "alpha": 0.9}, steps=20))
    training = report.training
    assert training["held_out_after"] < 0.8 * training["held_out_before"]
    assert [point["step"] for point in training["curve"]] == [0, 4, 8, 12, 16, 20]
    assert training["best_step"] > 0
    assert training["tokens_per_second"] > 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "config.json").read_text() == json.dumps(
        json.loads((tiny_llama / "config.json").read_text()), indent=2
    ) + "\n"
    moved = {row.name: row.rel_error for row in report.layers}
    assert moved
    assert all(error and error > 0 for error in moved.values())


def test_the_lineage_names_both_inputs(tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path) -> None:
    distil(tiny_llama, trained_llama, tmp_path / "out", recipe({"name": "mse"}))
    *_, step = Checkpoint.open(tmp_path / "out").manifest.lineage
    assert step["command"] == "distill"
    assert set(step["inputs"]) == set(step["teacher"]["inputs"]) == {"model.safetensors"}
    assert step["inputs"] != step["teacher"]["inputs"]
    assert "0" * 64 not in (*step["inputs"].values(), *step["teacher"]["inputs"].values())


def test_a_shallow_student_learns_hidden_states(
    shallow_llama: Path, tiny_llama: Path, recipe: Make, tmp_path: Path
) -> None:
    also = {"also": [{"name": "hidden", "weight": 0.5}]}
    report = distil(shallow_llama, tiny_llama, tmp_path / "out", recipe({"name": "kl"}, also))
    assert report.training["loss"] == "1 kl + 0.5 hidden"
    assert report.training["held_out_after"] < report.training["held_out_before"]


def test_a_student_learns_where_its_teacher_looks(
    shallow_llama: Path, tiny_llama: Path, tiny_bert: Path, wide_bert: Path, recipe: Make, tmp_path: Path
) -> None:
    report = distil(shallow_llama, tiny_llama, tmp_path / "causal", recipe({"name": "attention"}))
    assert report.training["held_out_after"] < report.training["held_out_before"]
    padded = distil(tiny_bert, wide_bert, tmp_path / "padded", recipe({"name": "attention", "layers": [2]}, steps=4))
    assert padded.training["held_out_after"] < padded.training["held_out_before"]


def test_an_encoder_learns_from_a_wider_one(tiny_bert: Path, wide_bert: Path, recipe: Make, tmp_path: Path) -> None:
    method = {"name": "embedding", "cosine": 0, "similarity": 1}
    also = {"also": [{"name": "relation", "weight": 0.1}]}
    report = distil(tiny_bert, wide_bert, tmp_path / "out", recipe(method, also))
    assert report.training["held_out_after"] < report.training["held_out_before"]
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()


def test_embeddings_go_through_dense_modules(other_bert: Path, wide_bert: Path, recipe: Make, tmp_path: Path) -> None:
    student, teacher = (
        checkpoints.add_dense(Path(shutil.copytree(path, tmp_path / path.name)), 24) for path in (other_bert, wide_bert)
    )
    report = distil(student, teacher, tmp_path / "out", recipe({"name": "embedding"}))
    assert report.training["held_out_after"] < report.training["held_out_before"]
    kept = tmp_path / "out" / "3_Dense" / "model.safetensors"
    assert kept.read_bytes() == (student / "3_Dense" / "model.safetensors").read_bytes()
    assert any("3_Dense" in line for line in report.warnings)


def test_cached_and_fresh_teachers_give_the_same_student(
    tiny_bert: Path, other_bert: Path, recipe: Make, tmp_path: Path
) -> None:
    found = {}
    for cache in (True, False):
        out = tmp_path / str(cache)
        report = distil(tiny_bert, other_bert, out, recipe({"name": "embedding"}, cache=cache))
        assert report.training["cached_teacher"] is cache
        found[cache] = weights(out)
    for name, tensor in found[True].items():
        torch.testing.assert_close(tensor, found[False][name], rtol=1e-3, atol=1e-4)


def test_the_teacher_runs_once_for_held_out_samples(
    tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    answer = Panel.__call__

    def counted(panel: Panel, batch: Batch, *rest: Any) -> Any:
        seen.extend(batch.index.tolist())
        return answer(panel, batch, *rest)

    monkeypatch.setattr(Panel, "__call__", counted)
    reports = {}
    for cache in ("auto", False):
        seen.clear()
        made = recipe({"name": "kl"}, cache=cache)
        plan = make_plan(tiny_llama, trained_llama, Destination(tmp_path / str(cache)), made)
        reports[cache] = run(plan, Options(latency="off")).training
        times = 1 if cache == "auto" else 3  # as it came, and after the fourth step and the last
        assert Counter(seen) == Counter([*plan.split.held_out.tolist() * times, *plan.split.used(8).tolist()])
    assert reports["auto"]["curve"] == reports[False]["curve"]
    assert reports["auto"]["cached_teacher"] is False  # its outputs for training samples


@pytest.mark.parametrize("losses", [{}, {"also": [{"name": "hidden"}, {"name": "attention"}]}])
def test_activations_that_are_computed_again_change_nothing_but_memory(
    trained_llama: Path, recipe: Make, tmp_path: Path, losses: dict[str, Any]
) -> None:
    student = compress(trained_llama, tmp_path / "student", lambda info, matrix: integers(matrix, 4))
    curves, kept = [], []
    for whether in (False, True):
        made = recipe({"name": "kl"}, losses, activation_checkpointing=whether, steps=2, evaluate_every=2)
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            report = distil(student, trained_llama, tmp_path / str(whether), made)
        curves.append(report.training["curve"])
        kept.append(sum(sizes))
    assert curves[0] == curves[1]
    assert kept[1] < 0.5 * kept[0] or losses  # attention maps that a loss compares are kept


def test_steps_of_so_many_tokens_are_longer_where_texts_are_short(
    tiny_bert: Path, other_bert: Path, recipe: Make, tmp_path: Path
) -> None:
    made = recipe({"name": "embedding"}, batch_tokens=200)
    report = distil(tiny_bert, other_bert, tmp_path / "out", made)
    assert report.training["held_out_after"] < report.training["held_out_before"]
    with pytest.raises(RecipeError, match="a sample takes"):
        distil(tiny_bert, other_bert, tmp_path / "none", recipe({"name": "embedding"}, batch_tokens=4))


def test_an_interrupted_run_resumes_to_the_same_bytes(
    tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path
) -> None:
    made = recipe({"name": "kl"}, ema=0.5, accumulate=2)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    distil(tiny_llama, trained_llama, whole, made)

    def stop(what: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(tiny_llama, trained_llama, stopped, made, save_seconds=0, progress=stop)
    assert not stopped.exists()
    steps: list[int] = []
    distil(tiny_llama, trained_llama, stopped, made, resume=True, progress=lambda what, done, total: steps.append(done))
    assert steps == [6, 7, 8]
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert {path.name for path in stopped.iterdir()} == {path.name for path in whole.iterdir()}
    curves = [json.loads((out / "report.json").read_text())["training"]["curve"] for out in (whole, stopped)]
    assert curves[0] == curves[1]


def test_training_ends_when_patience_does(tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path) -> None:
    wild = {"learning_rate": 1.0, "clip": None, "steps": 20, "evaluate_every": 2}
    report = distil(tiny_llama, trained_llama, tmp_path / "out", recipe({"name": "kl"}, **wild, patience=3))
    assert [point["step"] for point in report.training["curve"]] == [0, 2, 4, 6]
    assert report.training["best_step"] == 0
    assert any("ended at step 6 of 20: 3 measurements" in note for note in report.notes)
    learns = recipe({"name": "kl"}, steps=6, evaluate_every=2, patience=1)
    assert distil(tiny_llama, trained_llama, tmp_path / "better", learns).training["curve"][-1]["step"] == 6


def test_a_saved_state_of_another_recipe_is_refused(
    tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(tiny_llama, trained_llama, tmp_path / "out", recipe({"name": "kl"}), save_seconds=0, progress=stop)
    with pytest.raises(Refused, match="another input, recipe or version"):
        distil(tiny_llama, trained_llama, tmp_path / "out", recipe({"name": "mse"}), resume=True)


def test_equal_runs_give_equal_bytes_and_another_seed_others(
    tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path
) -> None:
    found = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        distil(tiny_llama, trained_llama, out, recipe({"name": "kl"}, {"seed": seed}, steps=4))
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_a_copy_of_a_tied_parameter_is_neither_trained_nor_written(
    tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path
) -> None:
    student = Path(shutil.copytree(tiny_llama, tmp_path / "student"))
    tensors = load_file(student / "model.safetensors")
    copied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(copied, student / "model.safetensors", metadata={"format": "pt"})
    made = recipe({"name": "kl"})
    report = distil(student, trained_llama, tmp_path / "copied", made)
    plain = distil(tiny_llama, trained_llama, tmp_path / "plain", made)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("copied", "plain")]
    assert written[0] == written[1]
    assert report.training["trained_parameters"] == plain.training["trained_parameters"]
    assert report.before is not None
    assert plain.before is not None
    assert report.before.parameters == plain.before.parameters
    assert report.before.weight_bytes > plain.before.weight_bytes


def test_zeros_of_a_pruned_student_stay_zero(
    tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path
) -> None:
    pruned = compress(tiny_llama, tmp_path / "pruned", lambda info, matrix: None)
    _zero_half(pruned / "model.safetensors")
    before = weights(pruned)
    report = distil(pruned, trained_llama, tmp_path / "out", recipe({"name": "kl"}, keep_zeros=True))
    after = weights(tmp_path / "out")
    assert report.training["best_step"] > 0
    assert report.training["zeros_kept"] == sum(int((t == 0).sum()) for t in before.values() if t.ndim == 2) > 0
    for name, tensor in before.items():
        if tensor.ndim == 2:
            assert bool((after[name][tensor == 0] == 0).all())
            assert not torch.equal(after[name], tensor)


def test_without_keep_zeros_they_move(tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path) -> None:
    pruned = compress(tiny_llama, tmp_path / "pruned", lambda info, matrix: None)
    _zero_half(pruned / "model.safetensors")
    distil(pruned, trained_llama, tmp_path / "out", recipe({"name": "kl"}))  # its lineage shows no pruning
    name = "model.layers.0.mlp.up_proj.weight"
    zeros = weights(pruned)[name] == 0
    assert bool((weights(tmp_path / "out")[name][zeros] != 0).any())


def _zero_half(path: Path) -> None:
    tensors = load_file(path)
    for tensor in tensors.values():
        if tensor.ndim == 2:
            tensor[tensor.abs() < tensor.abs().median()] = 0
    save_file(tensors, path, metadata={"format": "pt"})


def test_factors_scales_and_survivors_train_and_codes_and_masks_do_not(
    trained_llama: Path, recipe: Make, tmp_path: Path
) -> None:
    def pick(info: Any, matrix: torch.Tensor) -> Any:
        if info.kind != "linear":
            return None
        if "self_attn" in info.name:
            return integers(matrix, 3, 16, symmetric="q_proj" in info.name)
        return low_rank(matrix, 16) if "up_proj" in info.name else halved(matrix)

    student = compress(trained_llama, tmp_path / "student", pick)
    report = distil(student, trained_llama, tmp_path / "out", recipe({"name": "kl"}, learning_rate=5e-3))
    assert report.training["held_out_after"] < report.training["held_out_before"]
    before, after = weights(student), weights(tmp_path / "out")
    assert before["model.layers.0.mlp.up_proj.weight_in"].shape == (16, 64)
    codes = [name for name, tensor in before.items() if not tensor.is_floating_point()]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in codes} >= {"q_proj", "v_proj", "down_proj"}
    assert {name for name in before if torch.equal(before[name], after[name])} == set(codes)
    assert {row.name: row for row in report.layers}["model.layers.0.mlp.up_proj.low_rank.in"].rel_error > 0
    assert Checkpoint.open(student).layout == Checkpoint.open(tmp_path / "out").layout == "native"


def test_bfloat16_weights_stay_bfloat16(
    tiny_llama_bf16: Path, trained_llama: Path, recipe: Make, tmp_path: Path
) -> None:
    report = distil(tiny_llama_bf16, trained_llama, tmp_path / "out", recipe({"name": "kl"}, precision="bf16"))
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert report.training["held_out_after"] < report.training["held_out_before"]


def test_the_output_is_never_worse_than_the_input(
    trained_llama: Path, tiny_llama: Path, recipe: Make, tmp_path: Path
) -> None:
    # A student that is its own teacher can only get worse.
    report = distil(trained_llama, trained_llama, tmp_path / "out", recipe({"name": "kl"}, learning_rate=1e-2))
    assert report.training["best_step"] == 0
    assert report.training["held_out_after"] == report.training["held_out_before"]
    assert any("the weights are the input's" in warning for warning in report.warnings)
    for name, tensor in weights(trained_llama).items():
        assert torch.equal(weights(tmp_path / "out")[name], tensor)


def test_held_out_samples_are_never_trained_on(tiny_bert: Path, other_bert: Path, recipe: Make, tmp_path: Path) -> None:
    plan = make_plan(tiny_bert, other_bert, Destination(tmp_path / "out"), recipe({"name": "embedding"}))
    used = {int(index) for step in range(300) for index in plan.split.at(step)}
    assert used.isdisjoint(plan.split.held_out.tolist())
    rows = [tuple(row.tolist()) for row in plan.samples.columns["input_ids"]]
    held = {rows[index] for index in plan.split.held_out.tolist()}
    assert held.isdisjoint(rows[index] for index in used)


def test_a_loss_that_is_not_a_number_fails_and_leaves_nothing(
    tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match="step") as caught:
        distil(
            tiny_llama, trained_llama, tmp_path / "out", recipe({"name": "kl"}, learning_rate=1e30, warmup=0, clip=None)
        )
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_different_tokenizers_are_warned_of(
    tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    shutil.copytree(tiny_llama, student)
    plain = json.loads((student / "tokenizer.json").read_text())
    (student / "tokenizer.json").write_text(json.dumps(plain, indent=3))
    plan = make_plan(student, trained_llama, Destination(tmp_path / "out"), recipe({"name": "kl"}))
    assert any("tokenizers" in warning for warning in plan.warnings)


def test_tables_of_one_tokenizer_may_be_padded_to_other_sizes(tiny_llama: Path, recipe: Make, tmp_path: Path) -> None:
    padded = checkpoints.make_llama(tmp_path / "padded", vocab_size=300)
    shutil.copy(tiny_llama / "tokenizer.json", padded)
    report = distil(tiny_llama, padded, tmp_path / "out", recipe({"name": "kl"}, steps=2))
    assert all(point["held_out"] > 0 for point in report.training["curve"])
    assert weights(tmp_path / "out").keys() == weights(tiny_llama).keys()


class TestRefused:
    """What is wrong is said before any work."""

    def test_another_vocabulary(self, built: Path, tiny_llama: Path, recipe: Make, tmp_path: Path) -> None:
        large = checkpoints.make_llama(tmp_path / "llama-vocabulary", vocab_size=300)
        with pytest.raises(
            Refused, match=r"another vocabulary: the teacher's tokenizer has no '.*', '.*', '.*' and \d+ "
        ):
            make_plan(large, tiny_llama, Destination(tmp_path / "out"), recipe({"name": "kl"}))
        for name in FILES:
            (large / name).unlink(missing_ok=True)
        with pytest.raises(RecipeError, match="256 classes and the teacher 300"):
            make_plan(tiny_llama, large, Destination(tmp_path / "out"), recipe({"name": "kl"}))

    def test_hidden_states_of_another_width(
        self, tiny_bert: Path, wide_bert: Path, recipe: Make, tmp_path: Path
    ) -> None:
        with pytest.raises(RecipeError, match="48 and 64 wide"):
            make_plan(tiny_bert, wide_bert, Destination(tmp_path / "out"), recipe({"name": "hidden"}))

    def test_logits_of_an_encoder(self, tiny_bert: Path, wide_bert: Path, recipe: Make, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="gives no logits"):
            make_plan(tiny_bert, wide_bert, Destination(tmp_path / "out"), recipe({"name": "kl"}))

    def test_a_missing_teacher(self, tiny_llama: Path, recipe: Make, tmp_path: Path) -> None:
        with pytest.raises(Refused, match="does not exist"):
            make_plan(tiny_llama, tmp_path / "nobody", Destination(tmp_path / "out"), recipe({"name": "kl"}))

    def test_too_little_data(self, tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path) -> None:
        divided = recipe({"name": "kl"}, batch=4096, accumulate=4096)
        with pytest.raises(RecipeError, match="a batch is divided by 4096"):
            make_plan(tiny_llama, trained_llama, Destination(tmp_path / "out"), divided)

    def test_an_output_that_exists(self, tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(OutputExists):
            make_plan(tiny_llama, trained_llama, Destination(tmp_path / "out"), recipe({"name": "kl"}))

    def test_an_encoder_decoder(self, tiny_t5: Path, tiny_llama: Path, recipe: Make, tmp_path: Path) -> None:
        with pytest.raises(Refused, match="T5ForConditionalGeneration"):
            make_plan(tiny_t5, tiny_llama, Destination(tmp_path / "out"), recipe({"name": "kl"}))


def test_windows_are_as_long_as_models_take_and_a_batch_as_large_as_there_are_samples(
    tiny_llama: Path,
    trained_llama: Path,
    recipe: Make,
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = recipe(
        {"name": "kl"},
        {"data": {"text": str(text_file), "length": 300, "samples": 12}, "training": {"steps": 1, "batch": 64}},
    )
    plan = make_plan(tiny_llama, trained_llama, Destination(tmp_path / "out"), asked)
    assert "training samples are 256 tokens long, not 300: the models take no more" in plan.warnings
    left = len(plan.split.train)
    assert f"a batch takes {left} samples, not 64: there are {left} to train on" in plan.warnings
    assert plan.training.batch == plan.split.batch == left < 12
    assert plan.samples.columns["input_ids"].shape == (12, 256)
    report = run(plan, Options(latency="off"))
    assert set(plan.warnings) <= set(report.warnings)
    short = Path(shutil.copytree(trained_llama, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = make_plan(tiny_llama, short, Destination(tmp_path / "other"), asked)
    assert plan.samples.columns["input_ids"].shape == (12, 64)
    assert left % 2 == 1
    assert plan.training.batch == plan.split.batch == left - 1
    assert f"a batch takes {left - 1} samples, not 64: there are {left} to train on" in plan.warnings


def test_an_image_classifier_learns_from_arrays_with_labels(
    tiny_vit: Path, built: Path, digits_npz: Path, recipe: Make, tmp_path: Path
) -> None:
    teacher = checkpoints.make_vit(built / "vit-deep", num_hidden_layers=3)
    data = {"arrays": str(digits_npz), "inputs": "train_images", "labels": "train_labels", "scale": 255}
    made = recipe({"name": "kl", "alpha": 0.5}, {"data": data}, steps=16)
    report = distil(tiny_vit, teacher, tmp_path / "out", made)
    assert report.training["cached_teacher"] is False  # 16 steps of 8 use no sample twice
    assert report.training["held_out_after"] < report.training["held_out_before"]


DIGITS = {"inputs": "train_images", "scale": 255}
MODEL = {"sequential": ["flatten", "fc1", "relu", "fc2", "relu", "fc3"]}


def test_a_bare_file_learns_with_labels(mlp_file: Path, digits_npz: Path, recipe: Make, tmp_path: Path) -> None:
    def pick(info: Any, matrix: torch.Tensor) -> Any:
        return low_rank(matrix, 4) if info.name != "fc3" else None

    student = compress(mlp_file, tmp_path / "student.safetensors", pick)
    data = {"arrays": str(digits_npz), "inputs": "train_images", "labels": "train_labels", "scale": 255}
    made = recipe({"name": "kl", "alpha": 0.7}, {"data": data, "model": MODEL}, steps=60, evaluate_every=30, batch=32)
    out = tmp_path / "out.safetensors"
    report = distil(student, mlp_file, out, made)
    assert report.training["cached_teacher"] is True
    assert report.training["held_out_after"] < 0.8 * report.training["held_out_before"]
    assert Checkpoint.open(out).manifest.lineage[-1]["command"] == "distill"
    assert (tmp_path / "out.report.json").is_file()


def test_a_convolutional_file_keeps_its_batch_statistics(
    cnn_file: Path, digits_npz: Path, recipe: Make, tmp_path: Path
) -> None:
    model = {"sequential": ["conv1", "bn1", "relu", "maxpool:2", "conv2", "bn2", "relu", "maxpool:2", "flatten", "fc"]}
    student = compress(cnn_file, tmp_path / "student.safetensors", lambda info, matrix: integers(matrix, 2))
    made = recipe({"name": "mse"}, {"data": {**DIGITS, "arrays": str(digits_npz)}, "model": model}, steps=20)
    out = tmp_path / "out.safetensors"
    report = distil(student, cnn_file, out, made)
    assert report.training["held_out_after"] < report.training["held_out_before"]
    before, after = weights(student), weights(out)
    assert torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])
    assert not torch.equal(before["bn1.weight"], after["bn1.weight"])


def test_labels_outside_the_classes_are_refused(mlp_file: Path, recipe: Make, tmp_path: Path) -> None:
    import numpy as np

    arrays = tmp_path / "wrong.npz"
    np.savez(arrays, images=np.zeros((40, 784), np.uint8), labels=np.full(40, 12))
    data = {"arrays": str(arrays), "inputs": "images", "labels": "labels"}
    with pytest.raises(RecipeError, match="from 12 to 12, the student has 10 classes"):
        make_plan(
            mlp_file, mlp_file, Destination(tmp_path / "out.safetensors"),
            recipe({"name": "kl", "alpha": 0.5}, {"data": data, "model": MODEL}),
        )  # fmt: skip


def test_a_bare_file_without_a_model_is_refused(mlp_file: Path, digits_npz: Path, recipe: Make, tmp_path: Path) -> None:
    data = {"arrays": str(digits_npz), "inputs": "train_images"}
    with pytest.raises(RecipeError, match="the recipe no model"):
        make_plan(mlp_file, mlp_file, Destination(tmp_path / "out.safetensors"), recipe({"name": "kl"}, {"data": data}))


def test_a_dry_run_knows_the_bytes(tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path) -> None:
    plan = make_plan(tiny_llama, trained_llama, Destination(tmp_path / "out"), recipe({"name": "kl"}))
    summary = plan.summary()
    assert summary.command == "distill"
    assert summary.weight_bytes == plan.output.weight_bytes
    assert len(summary.rows) == len(plan.layers)
    assert not (tmp_path / "out").exists()
