"""Modes of distillation, found by discovery: each moves what it says of every stored form, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aicompress import load as load_model
from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError
from aicompress.methods.healing import StudentParameter, get_mode, modes
from aicompress.pipeline.distillation.plan import DistillPlan, make_plan
from aicompress.pipeline.distillation.run import run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import load
from aicompress.recipe.schema import schema
from aicompress.weights import Weight, restore
from tests.pipeline.distillation import every_form
from tests.weights.forms import FORMS

SHORT = {
    "blocks": {"name": "blocks", "steps": 5, "samples": 40}
}  # blocks of the chain are its layers, of which it has many


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A student with a layer in every form, its teacher, and samples."""
    return every_form.write(tmp_path_factory.mktemp("every-form"))


def planned(inputs: tuple[Path, Path, Path], folder: Path, mode: Any, **training: Any) -> DistillPlan:
    student, teacher, samples = inputs
    settings = {"steps": 2, "batch": 8, "evaluate_every": 1, "learning_rate": 1e-3, "warmup": 0, "precision": "fp32"}
    plain = {
        "version": 1,
        "mode": mode,
        "method": {"name": "mse"},
        "model": {"sequential": every_form.SEQUENTIAL},
        "data": {"arrays": str(samples), "inputs": "x"},
        "report": {"html": False},
        "training": {**settings, "held_out": 0.2, "weight_decay": 0, **training},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(plain))
    return make_plan(student, teacher, Destination(folder / "out.safetensors"), load(str(path)))


def stored(path: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors by parameter and suffix."""
    checkpoint = Checkpoint.open(path)
    return {
        name: checkpoint.weight(name).tensors() if name in checkpoint.manifest.entries else {"": checkpoint.read(name)}
        for name in checkpoint.parameters()
    }


def held_out_loss(plan: DistillPlan, path: Path) -> float:
    """The loss of a checkpoint as it lies on disk, on the samples that are held out."""
    batch = plan.samples.batch(plan.split.held_out).inputs[""]
    sides = [
        load_model(each, model=plan.module_of(checkpoint), kernels="reference", dtype=torch.float32)
        for each, checkpoint in ((path, plan.checkpoint), (plan.teachers[0].path, plan.teachers[0]))
    ]
    ours, theirs = (side(batch) for side in sides)
    return float((ours - theirs).square().mean())


@pytest.mark.parametrize("name", [name for name, mode in modes().items() if mode.recodes is None])
def test_a_mode_moves_what_it_says_and_what_is_written_is_what_was_judged(
    inputs: tuple[Path, Path, Path], tmp_path: Path, name: str
) -> None:
    plan = planned(inputs, tmp_path, SHORT.get(name, name))
    report = run(plan, Options(latency="off"))
    out = tmp_path / "out.safetensors"
    # What is fitted layer by layer may lose at the end of so long a chain: that it wins elsewhere has tests of its own.
    assert plan.healing.config.of_a_twin or report.training["held_out_after"] < report.training["held_out_before"]
    assert held_out_loss(plan, out) == pytest.approx(report.training["held_out_after"], rel=1e-4)
    before, after = stored(inputs[0]), stored(out)
    assert after.keys() == before.keys()
    for parameter, tensors in before.items():
        assert {s: (t.dtype, t.shape) for s, t in tensors.items()} == {
            s: (t.dtype, t.shape) for s, t in after[parameter].items()
        }
        moved = {s for s, tensor in tensors.items() if not torch.equal(tensor, after[parameter][s])}
        assert moved <= plan.healing.suffixes[parameter], parameter
    if plan.healing.mode.keeps_zeros:
        was, now = (side["last.weight"][""] for side in (before, after))  # a dense matrix with zeros
        assert torch.equal(now == 0, was == 0)
        assert bool((now != was)[was != 0].all())
    rows = {row.name.split(".")[0]: row for row in report.layers}
    assert all((row.method == "-") == plan.healing.stays(f"{layer}.weight") for layer, row in rows.items())


@pytest.mark.parametrize("name", modes())
def test_a_form_is_moved_or_refused_in_one_line(name: str) -> None:
    for weight in FORMS.values():
        require_moved_or_refused(weight, name)


def require_moved_or_refused(weight: Weight, name: str) -> None:
    outline = restore({suffix: tensor.to("meta") for suffix, tensor in weight.tensors().items()}, weight.meta())
    parameter, mode = StudentParameter("fc.weight", (6, 12), outline), get_mode(name)
    config = mode.config(name=name)
    moves, refused = mode.moves(parameter, config), mode.check([parameter], config)
    assert moves <= set(outline.tensors())
    assert moves or refused
    if refused:
        assert all(line and "\n" not in line for line in refused)


def test_scales_of_every_depth_move(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    plan = planned(inputs, tmp_path, "scales")
    for name, moved in {
        "int_2_6_3_sym": {"scale"},
        "real_zero_points": {"scale", "zero"},
        "sparse_codes_2_6_3_asym": {"scale"},
        "table_and_scales": {"tables", "scale"},
        "float8_blocks": {"scale"},
        "column_factors": {"scale", "columns"},
        "quantized_factors": {"scale", "in_scale"},
        "corrected_all_quantized": {"scale", "columns", "correction_scale"},
        "low_rank": set(),
        "last": set(),
    }.items():
        assert plan.healing.suffixes[f"{name}.weight"] == moved
    assert plan.healing.suffixes["last_norm.weight"] == {""}
    assert any(note.startswith("mode scales: ") for note in plan.summary().notes)


def test_zeros_that_a_mode_keeps_are_not_given_up_by_the_training(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="mode masked keeps zeros"):
        planned(inputs, tmp_path, "masked", keep_zeros=False)


def test_a_student_that_has_nothing_for_a_mode_is_refused(tiny_bert: Path, text_file: Path, tmp_path: Path) -> None:
    for mode, message in (("scales", "no layer of the student is stored as codes"), ("masked", "no weight")):
        recipe = load("distill/embedding", [f"mode={mode}", f"data.text={text_file}", "data.length=16"])
        with pytest.raises(RecipeError, match=f"mode {mode}: {message}") as caught:
            make_plan(tiny_bert, tiny_bert, Destination(tmp_path / "out"), recipe)
        assert "mode: full" in caught.value.hint


def test_a_mode_is_a_name_or_parameters_and_full_is_told_to_nobody(tmp_path: Path) -> None:
    assert load("distill/kl", ["mode=scales"]).mode == load("distill/scales", ["mode.name=scales"]).mode
    assert "mode" not in load("distill/kl").resolved()
    with pytest.raises(RecipeError, match="no mode 'scale'"):
        load("distill/scales", ["mode=scale"])
    with pytest.raises(RecipeError, match=r"mode\.rate: unknown key"):
        load("distill/kl", ["mode.name=full", "mode.rate=1"])
    names, *options = schema("distill")["properties"]["mode"]["oneOf"]
    assert names["enum"] == [option["properties"]["name"]["const"] for option in options] == list(modes())


def test_blocks_go_on_behind_those_that_a_stopped_run_has_tuned(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    mode = {"name": "blocks", "steps": 2, "samples": 16}
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    run(planned(inputs, tmp_path / "whole", mode), Options(latency="off"))

    def stop(what: str, done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    plan = planned(inputs, tmp_path / "stopped", mode)
    with pytest.raises(KeyboardInterrupt):
        run(plan, Options(latency="off", progress=stop))
    (kept,) = tmp_path.glob("stopped/*/training/block-5.safetensors")
    written = kept.stat().st_mtime_ns
    steps: list[int] = []

    def see(what: str, done: int, total: int) -> None:
        if what == "block":
            assert done > 6 or kept.stat().st_mtime_ns == written
            steps.append(done)

    run(plan, Options(latency="off", resume=True, progress=see))
    outs = [(tmp_path / name / "out.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert outs[0] == outs[1]
    assert not kept.exists()
