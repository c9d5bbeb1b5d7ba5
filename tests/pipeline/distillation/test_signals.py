"""A teacher's stored outputs: what is learned from them, when they are refused, and what a stopped run leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.place import working_path
from aicompress.errors import CheckpointError, CompressError, RecipeError, Refused
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.run import run
from aicompress.pipeline.distillation.signals import teacher as stored_teacher
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import DistillRecipe, load
from aicompress.report.model import Report

Make = Callable[..., DistillRecipe]
OFF = Options(latency="off")
TOP = {"signals": {"k": 16}}


@pytest.fixture
def recipe(tmp_path: Path, text_file: Path) -> Make:
    """Recipes on the first windows of the session's text: a loss, whole sections."""

    def make(method: dict[str, Any], sections: dict[str, Any] | None = None, **data: Any) -> DistillRecipe:
        settings = {
            "steps": 3,
            "batch": 4,
            "evaluate_every": 3,
            "held_out": 0.25,
            "learning_rate": 2e-3,
            "precision": "fp32",
        }
        section = {"text": str(text_file), "length": 16, "samples": 24, **data}
        plain = {"version": 1, "method": method, "data": section, "training": settings}
        (tmp_path / "recipe.yaml").write_text(json.dumps({**plain, **(sections or {})}))
        return load(str(tmp_path / "recipe.yaml"))

    return make


def distil(student: Path, teacher: Path | None, out: Path, made: DistillRecipe, cache: Path | None) -> Report:
    return run(make_plan(student, teacher, Destination(out), made, cache=cache), OFF)


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_a_second_run_needs_no_teacher(tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path) -> None:
    cache, made = tmp_path / "cache", recipe({"name": "kl"}, TOP)
    plan = make_plan(tiny_llama, trained_llama, Destination(tmp_path / "first"), made, cache=cache)
    planned = "the 16 most likely of 256 classes at temperature 2, 66 bytes a token"
    assert any(planned in note and "is made there" in note for note in plan.summary().notes)
    first = run(plan, OFF)
    stored = first.training["signals"]
    assert stored["made"]
    assert stored["bytes_per_token"] == pytest.approx(66, abs=1)
    assert sum(tensor.nbytes for tensor in load_file(cache / "signals-00001.safetensors").values()) == stored["bytes"]
    gone = Path(shutil.copytree(trained_llama, tmp_path / "gone"))
    again = distil(tiny_llama, gone, tmp_path / "again", made, cache)  # the same teacher, elsewhere
    shutil.rmtree(gone)
    alone = distil(tiny_llama, None, tmp_path / "alone", made, cache)
    assert not again.training["signals"]["made"]
    assert any("no teacher is loaded" in note for note in alone.notes)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "alone")]
    assert written[0] == written[1] == written[2]
    steps = [Checkpoint.open(tmp_path / name).manifest.lineage[-1] for name in ("first", "alone")]
    assert steps[0]["teacher"] == steps[1]["teacher"]
    assert steps[0]["signals"] == {"form": "top", "k": 16, "temperature": 2.0, "seed": None, "outputs": ["logits"]}
    assert first.training["held_out_after"] < first.training["held_out_before"]


@pytest.mark.parametrize("name", ["jsd", "dkd", "mse"])
def test_all_logits_are_the_teacher_itself(
    tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path, name: str
) -> None:
    made = recipe({"name": name}, {"signals": {"k": 256}})
    distil(tiny_llama, trained_llama, tmp_path / "stored", made, tmp_path / "cache")
    distil(tiny_llama, trained_llama, tmp_path / "plain", recipe({"name": name}), None)
    stored, plain = weights(tmp_path / "stored"), weights(tmp_path / "plain")
    for each, tensor in stored.items():
        torch.testing.assert_close(tensor, plain[each], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_losses_learn_from_the_known_classes_classes(
    tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path, name: str
) -> None:
    report = distil(tiny_llama, trained_llama, tmp_path / "out", recipe({"name": name}, TOP), tmp_path / "cache")
    assert report.training["held_out_after"] < report.training["held_out_before"]


def test_draws_teach(tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path) -> None:
    made = recipe({"name": "kl"}, {"signals": {"form": "drawn", "k": 8}})
    report = distil(tiny_llama, trained_llama, tmp_path / "out", made, tmp_path / "cache")
    assert report.training["signals"]["bytes_per_token"] == pytest.approx(16, abs=1)
    assert report.training["held_out_after"] < report.training["held_out_before"]
    with pytest.raises(Refused, match="another seed: 0, not 5"):
        make_plan(
            tiny_llama, None, Destination(tmp_path / "o"),
            made.model_copy(update={"seed": 5}), cache=tmp_path / "cache",
        )  # fmt: skip


def test_classes_and_embeddings_are_stored_whole(
    tiny_vit: Path, tiny_bert: Path, other_bert: Path, digits_npz: Path, recipe: Make, tmp_path: Path
) -> None:
    data = {"arrays": str(digits_npz), "inputs": "train_images", "scale": 255, "samples": 40}
    made = recipe({"name": "mse"}, {"data": data})
    report = distil(tiny_vit, tiny_vit, tmp_path / "vit", made, tmp_path / "classes")
    assert report.training["signals"]["stored"] == "all 10 logits"
    assert report.training["signals"]["bytes_per_sample"] == pytest.approx(44)
    assert report.training["held_out_before"] < 1e-9
    found = [
        distil(tiny_bert, other_bert, tmp_path / f"bert-{number}", recipe({"name": "embedding"}), cache)
        for number, cache in enumerate((tmp_path / "embeddings", None))
    ]
    curves = [[point["held_out"] for point in report.training["curve"]] for report in found]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


class TestRefused:
    """A folder of something else, and losses that cannot learn from it, are refused in one line with a hint."""

    @pytest.fixture
    def cache(self, tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path) -> Path:
        distil(tiny_llama, trained_llama, tmp_path / "made", recipe({"name": "kl"}, TOP), tmp_path / "cache")
        return tmp_path / "cache"

    def test_other_things(
        self, cache: Path, tiny_llama: Path, trained_llama: Path, heldout_file: Path, recipe: Make, tmp_path: Path
    ) -> None:
        other = Path(shutil.copytree(tiny_llama, tmp_path / "tokenizer"))
        plain = json.loads((other / "tokenizer.json").read_text())
        (other / "tokenizer.json").write_text(json.dumps(plain, indent=7))
        tuned = Path(shutil.copytree(trained_llama, tmp_path / "tuned"))
        config = json.loads((tuned / "config.json").read_text())
        (tuned / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
        kl = {"name": "kl"}
        cases: list[tuple[Path, Path | None, DistillRecipe, str]] = [
            (tiny_llama, tiny_llama, recipe(kl, TOP), "another teacher"),
            (tiny_llama, tuned, recipe(kl, TOP), "another configuration of the teacher"),
            (other, None, recipe(kl, TOP), "another tokenizer"),
            (tiny_llama, None, recipe(kl, TOP, text=str(heldout_file)), "another text"),
            (tiny_llama, None, recipe(kl, TOP, samples=23), "other samples, or of another order"),
            (tiny_llama, None, recipe(kl, {"signals": {"k": 8}}), "another k: 16, not 8"),
            (tiny_llama, None, recipe(kl, {"signals": {"k": 16, "form": "drawn"}}), "another form: top, not drawn"),
            (tiny_llama, None, recipe({**kl, "temperature": 3}, TOP), r"another temperature: 2\.0, not 3\.0"),
        ]
        for student, teacher, made, told in cases:
            with pytest.raises(Refused, match=told) as caught:
                make_plan(student, teacher, Destination(tmp_path / "out"), made, cache=cache)
            assert caught.value.hint
        (cache / "signals-00001.safetensors").write_bytes(b"half")
        with pytest.raises(CheckpointError, match="cut short"):
            make_plan(tiny_llama, None, Destination(tmp_path / "out"), recipe(kl, TOP), cache=cache)

    @pytest.mark.parametrize(
        ("method", "sections", "told"),
        [
            ({"name": "mse"}, TOP, "mse compares every logit, and the stored form is top"),
            ({"name": "jsd"}, {"signals": {"form": "drawn"}}, "jsd would be biased by draws"),
            ({"name": "hidden"}, {}, "hidden reads hidden of the teacher"),
            ({"name": "kl", "temperature": [4, 1]}, TOP, "a temperature that changes"),
            ({"name": "kl"}, {**TOP, "also": [{"name": "jsd", "temperature": 1}]}, "unlike temperatures"),
            ({"name": "kl"}, {"mean_teacher": {}}, "a mean teacher changes with every step"),
        ],
    )
    def test_losses(
        self, tiny_llama: Path, recipe: Make, tmp_path: Path,
        method: dict[str, Any], sections: dict[str, Any], told: str,
    ) -> None:  # fmt: skip
        teacher = None if "mean_teacher" in sections else tiny_llama
        with pytest.raises(Refused, match=told):
            make_plan(
                tiny_llama, teacher, Destination(tmp_path / "out"), recipe(method, sections), cache=tmp_path / "new"
            )

    def test_places(self, tiny_llama: Path, recipe: Make, tmp_path: Path) -> None:
        for place, told in ((tiny_llama / "in", "inside the input"), (tmp_path / "out" / "in", "lie in one another")):
            with pytest.raises(Refused, match=told):
                make_plan(tiny_llama, tiny_llama, Destination(tmp_path / "out"), recipe({"name": "kl"}), cache=place)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes").touch()
        with pytest.raises(Refused, match="holds no outputs of a teacher"):
            make_plan(
                tiny_llama, tiny_llama, Destination(tmp_path / "out"), recipe({"name": "kl"}), cache=tmp_path / "mine"
            )
        with pytest.raises(RecipeError, match="no place is given"):
            make_plan(tiny_llama, tiny_llama, Destination(tmp_path / "out"), recipe({"name": "kl"}, TOP))


def test_what_a_stopped_run_leaves_is_continued_or_made_anew(
    tiny_llama: Path, trained_llama: Path, recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_teacher, "SHARD_BYTES", 6000)  # of six samples
    made, done = recipe({"name": "kl"}, TOP), list[int]()

    def stop(what: str, count: int, total: int) -> None:
        done.append(count)
        if what == "teacher" and count > 10:
            raise KeyboardInterrupt

    def progress(what: str, count: int, total: int) -> None:
        done.extend([count] if what == "teacher" else [])

    plan = make_plan(tiny_llama, trained_llama, Destination(tmp_path / "out"), made, cache=tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        run(plan, Options(latency="off", progress=stop))
    work = working_path(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert (work / "signals-00001.safetensors").exists()
    kept = (work / "signals-00001.safetensors").stat().st_ino
    done.clear()
    run(plan, Options(latency="off", progress=progress))
    assert min(done) > 6
    assert (tmp_path / "cache" / "signals-00001.safetensors").stat().st_ino == kept
    assert not work.exists()
    distil(tiny_llama, trained_llama, tmp_path / "whole", made, tmp_path / "again")
    for shard in sorted((tmp_path / "cache").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        run(make_plan(tiny_llama, trained_llama, Destination(tmp_path / "o"), made, cache=tmp_path / "cache"),
            Options(latency="off", progress=stop))  # fmt: skip
    distil(tiny_llama, tiny_llama, tmp_path / "other", made, tmp_path / "cache")  # another teacher
    ones = [(tmp_path / name / "signals-00001.safetensors").read_bytes() for name in ("cache", "again")]
    assert ones[0] != ones[1]


def test_a_teacher_that_gives_no_numbers(tiny_llama: Path, recipe: Make, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    broken = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match="the teacher gives NaN"):
        distil(tiny_llama, broken, tmp_path / "out", recipe({"name": "kl"}), tmp_path / "cache")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()
