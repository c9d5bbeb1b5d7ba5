"""What goes wrong around a training run: samples, teachers, disks, and data that changes."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aicompress.errors import CompressError, RecipeError, Refused
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.run import TrainingOptions, run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import DistillRecipe, load
from aicompress.report.model import Report
from tests import checkpoints


def recipe(folder: Path, text: Path, method: str = "kl", samples: int | None = 20, **training: Any) -> DistillRecipe:
    settings = {"steps": 2, "batch": 4, "evaluate_every": 2, "precision": "fp32", **training}
    data = {"text": str(text), "length": 16, "samples": samples}
    plain = {"version": 1, "method": {"name": method}, "data": data, "training": settings}
    (folder / "recipe.yaml").write_text(json.dumps(plain))
    return load(str(folder / "recipe.yaml"))


def distil(
    student: Path, teacher: Path, out: Path, asked: DistillRecipe, save_seconds: float = 60.0, **options: Any
) -> Report:
    plan = make_plan(student, teacher, Destination(out), asked)
    return run(plan, Options(**{"latency": "off", **options}), TrainingOptions(save_seconds))


def changed(source: Path, copy: Path, change: Any) -> Path:
    """A copy of a checkpoint whose tensors a function changes."""
    shutil.copytree(source, copy)
    tensors = load_file(copy / "model.safetensors")
    save_file({n: change(n, t) for n, t in tensors.items()}, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_one_sample(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="hold out") as caught:
        distil(tiny_llama, tiny_llama, tmp_path / "out", recipe(tmp_path, text_file, samples=1, batch=1))
    assert caught.value.hint


def pair() -> Any:
    """A factory of a module that gives two tensors."""

    class Pair(checkpoints.Mlp):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), x

    return Pair()


def test_a_module_of_a_factory_has_the_classes_that_it_gives(mlp_file: Path, digits_npz: Path, tmp_path: Path) -> None:
    def planned(factory: str, allow_code: bool = True, **data: Any) -> Any:
        section = {"arrays": str(digits_npz), "inputs": "train_images", "scale": 255, **data}
        settings = {"steps": 1, "batch": 16, "evaluate_every": 1, "precision": "fp32"}
        plain = {"version": 1, "method": {"name": "kl"}, "model": {"factory": factory}, "data": section}
        (tmp_path / "recipe.yaml").write_text(json.dumps({**plain, "training": settings}))
        asked = load(str(tmp_path / "recipe.yaml"))
        return make_plan(
            mlp_file, mlp_file, Destination(tmp_path / "out.safetensors", overwrite=True), asked, allow_code
        )

    report = run(planned("tests.checkpoints:Mlp"), Options(latency="off"))
    assert report.training["held_out_before"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(Refused, match="the recipe wants to run"):
        planned("tests.checkpoints:Mlp", allow_code=False)
    with pytest.raises(Refused, match="the factory's module gives a tuple for a sample"):
        planned(f"{__name__}:pair")
    with pytest.raises(Refused, match="the model does not run on the training data"):
        planned("tests.checkpoints:Mlp", inputs="train_labels")


def test_texts_of_which_the_tokenizer_makes_nothing(tiny_bert: Path, other_bert: Path, tmp_path: Path) -> None:
    models = [Path(shutil.copytree(path, tmp_path / path.name)) for path in (tiny_bert, other_bert)]
    for model in models:
        plain = json.loads((model / "tokenizer.json").read_text())
        (model / "tokenizer.json").write_text(json.dumps({**plain, "post_processor": None}))
    lines = [f"the {word} sat" for word in ("cat", "dog", "hen", "cow", "pig", "fox", "owl", "elk")]
    (tmp_path / "some.txt").write_text("\n".join([*lines, "\x01", "\x02"]), encoding="utf-8")
    (tmp_path / "none.txt").write_text("\x01\n\x02\n\x03\n", encoding="utf-8")
    asked = recipe(tmp_path, tmp_path / "some.txt", "embedding", samples=None, held_out=0.2)
    report = distil(*models, tmp_path / "out", asked)
    assert (report.training["data"]["samples"], report.training["data"]["skipped"]) == (8, 2)
    assert report.training["held_out_before"] < float("inf")
    with pytest.raises(RecipeError, match="no text has a token"):
        distil(*models, tmp_path / "o", recipe(tmp_path, tmp_path / "none.txt", "embedding", samples=None))


def test_a_teacher_in_half_precision(tiny_llama: Path, trained_llama: Path, text_file: Path, tmp_path: Path) -> None:
    half = changed(trained_llama, tmp_path / "half", lambda name, tensor: tensor.half())
    asked = recipe(tmp_path, text_file)
    reports = [distil(tiny_llama, each, tmp_path / f"out-{each.name}", asked) for each in (half, trained_llama)]
    one, other = (report.training["held_out_after"] for report in reports)
    assert one == pytest.approx(other, rel=1e-2)


def test_a_student_wider_than_its_teacher(tiny_bert: Path, wide_bert: Path, text_file: Path, tmp_path: Path) -> None:
    report = distil(wide_bert, tiny_bert, tmp_path / "out", recipe(tmp_path, text_file, "relation", batch=8, steps=4))
    assert report.training["held_out_after"] < report.training["held_out_before"]


@pytest.mark.parametrize("method", ["kl", "hidden"])
def test_a_teacher_that_gives_no_numbers_is_named(
    tiny_llama: Path, text_file: Path, tmp_path: Path, method: str
) -> None:
    def broken(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor / 0 if name == "model.layers.0.mlp.down_proj.weight" else tensor

    teacher = changed(tiny_llama, tmp_path / "teacher", broken)
    with pytest.raises(CompressError, match="the teacher gives NaN or infinite outputs for sample") as caught:
        distil(tiny_llama, teacher, tmp_path / "out", recipe(tmp_path, text_file, method))
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_names_step_and_samples(
    tiny_llama: Path, trained_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    asked = recipe(tmp_path, text_file, learning_rate=1e30, warmup=0, steps=6, evaluate_every=6, batch=10)
    with pytest.raises(CompressError, match=r"at step 2, on samples (\d+, ){8}\.\.\.: nothing is written"):
        distil(tiny_llama, trained_llama, tmp_path / "out", asked)


def test_a_full_disk_keeps_the_state_before_and_the_run(
    tiny_llama: Path, trained_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    size = (tiny_llama / "model.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size, limits[1]))  # a state holds weights and two moments
    try:
        report = distil(tiny_llama, trained_llama, tmp_path / "out", recipe(tmp_path, text_file), save_seconds=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert any("the disk was full when 2 states" in warning for warning in report.warnings)
    distil(tiny_llama, trained_llama, tmp_path / "plain", recipe(tmp_path, text_file))
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "plain"))
    assert one.read_bytes() == other.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "out", "plain"}


def test_data_that_changed_since_a_run_was_stopped(
    tiny_llama: Path, trained_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    text = Path(shutil.copy(text_file, tmp_path / "text.txt"))
    asked = recipe(tmp_path, text)
    with pytest.raises(KeyboardInterrupt):
        distil(tiny_llama, trained_llama, tmp_path / "out", asked, save_seconds=0, progress=stop)
    text.write_text("A" + text.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(Refused, match="another input, recipe or version"):
        distil(tiny_llama, trained_llama, tmp_path / "out", asked, resume=True)
