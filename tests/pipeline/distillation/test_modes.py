"""Modes of distillation, found by discovery: each moves what it says of every stored form, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aicompress import load as load_model
from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError
from aicompress.methods.modes import StudentParameter, get_mode, modes
from aicompress.pipeline.distillation.plan import DistillPlan, make_plan
from aicompress.pipeline.distillation.run import TrainingOptions, run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import load
from aicompress.recipe.schema import schema
from aicompress.weights import LowRank, Weight, restore
from tests.model.compressed import compress
from tests.pipeline.distillation import every_form
from tests.weights.forms import FORMS, ints, randn

RATES = {"rate": 0.1, "scale_rate": 0.01, "factor_rate": 0.05}
SHORT = {"blocks": {"name": "blocks", "steps": 8, "samples": 40, **RATES}}  # blocks of the chain are its many layers


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A student with a layer in every form, its teacher, and samples."""
    return every_form.write(tmp_path_factory.mktemp("every-form"))


def planned(
    inputs: tuple[Path, Path, Path],
    folder: Path,
    mode: Any,
    sequential: Sequence[str] = every_form.SEQUENTIAL,
    **training: Any,
) -> DistillPlan:
    student, teacher, samples = inputs
    settings = {"steps": 2, "batch": 8, "evaluate_every": 1, "learning_rate": 1e-3, "warmup": 0, "precision": "fp32"}
    plain = {
        "version": 1,
        "mode": mode,
        "method": {"name": "mse"},
        "model": {"sequential": list(sequential)},
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
    assert report.training["held_out_after"] < report.training["held_out_before"]
    assert held_out_loss(plan, out) == pytest.approx(report.training["held_out_after"], rel=1e-4)
    before, after = stored(inputs[0]), stored(out)
    assert after.keys() == before.keys()
    for parameter, tensors in before.items():
        assert {s: (t.dtype, t.shape) for s, t in tensors.items()} == {
            s: (t.dtype, t.shape) for s, t in after[parameter].items()
        }
        moved = {s for s, tensor in tensors.items() if not torch.equal(tensor, after[parameter][s])}
        assert moved <= plan.student_mode.suffixes[parameter], parameter
    # The student's biases are zero, and the teacher's are not. Beside one layer's large numbers its own does not count.
    assert all(after[f"{layer}.bias"][""].any() for layer in every_form.LAYERS if layer != "quantized_factors")
    if plan.student_mode.mode.keeps_zeros:
        was, now = (side["last.weight"][""] for side in (before, after))  # a dense matrix with zeros
        assert torch.equal(now == 0, was == 0)
        assert bool((now != was)[was != 0].all())
    rows = {row.name.split(".")[0]: row for row in report.layers}
    assert all((row.method == "-") == plan.student_mode.stays(f"{layer}.weight") for layer, row in rows.items())


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
    mode = get_mode("scales")
    for name, moved in {
        "int 2 (6, 3) sym": {"scale"},
        "real zero points": {"scale", "zero"},
        "sparse codes 2 (6, 3) asym": {"scale"},
        "table and scales": {"tables", "scale"},
        "float8, blocks": {"scale"},
        "column factors": {"scale", "columns"},
        "quantized factors": {"scale", "in_scale"},
        "corrected, all quantized": {"scale", "columns", "correction_scale"},
        "three convolutions": {"scale", "core_scale"},
        "entropy-coded": {"scale"},
        "low rank": set(),
    }.items():
        assert mode.moves(StudentParameter("fc.weight", (6, 12), FORMS[name]), mode.config()) == moved
    plan = planned(inputs, tmp_path, "scales")
    assert plan.student_mode.suffixes["last_norm.weight"] == {""}
    assert plan.student_mode.suffixes["last.weight"] == set()
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


BLOCKS = {"name": "blocks", "steps": 2, "samples": 16}
LAYERS = ["one", "two", "three"]


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A student of three layers, two of which share their right factor, in a file that nobody may write to."""
    folder = tmp_path_factory.mktemp("sharing")
    student, teacher, samples = folder / "student.safetensors", folder / "teacher.safetensors", folder / "samples.npz"
    plain = {f"{name}.weight": randn(12, 12, seed=number) for number, name in enumerate(LAYERS)}
    save_file({**plain, **{f"{name}.bias": torch.ones(12) for name in LAYERS}}, teacher)
    right = ints(4, (3, 1), True, (3, 12))

    def pick(info: Any, matrix: Tensor) -> Weight | None:
        return None if info.name == "three" else LowRank(ints(8, (12, 1), True, (12, 3)), right)

    compress(teacher, student, pick, {"two.weight": {"in": "one.weight"}})
    student.chmod(0o444)
    np.savez(samples, x=randn(40, 12, seed=7).numpy())
    return student, teacher, samples


@pytest.mark.parametrize("mode", ["full", "scales", "factors", "codes", BLOCKS])
def test_what_two_layers_share_stays_shared(sharing: tuple[Path, Path, Path], tmp_path: Path, mode: Any) -> None:
    report = run(planned(sharing, tmp_path, mode, LAYERS, learning_rate=1e-2), Options(latency="off"))
    assert report.training["held_out_after"] < report.training["held_out_before"]
    before, after = (Checkpoint.open(path) for path in (sharing[0], tmp_path / "out.safetensors"))
    one, two = (after.weight(f"{name}.weight") for name in ("one", "two"))
    assert isinstance(one, LowRank)
    assert isinstance(two, LowRank)
    assert torch.equal(one.inner.dense(), two.inner.dense())
    assert after.tensors.keys() == before.tensors.keys()


@pytest.mark.parametrize("mode", ["codes", BLOCKS])
def test_a_stopped_run_goes_on_to_the_same_bytes(sharing: tuple[Path, Path, Path], tmp_path: Path, mode: Any) -> None:
    often, plans = TrainingOptions(save_seconds=0), []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        plans.append(planned(sharing, tmp_path / name, mode, LAYERS, learning_rate=1e-2))
    run(plans[0], Options(latency="off"), often)

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt  # behind the first step, or the first block

    with pytest.raises(KeyboardInterrupt):
        run(plans[1], Options(latency="off", progress=stop), often)
    (kept,) = (tmp_path / "stopped").glob("*/training/*-*.safetensors")
    run(plans[1], Options(latency="off", resume=True), often)
    outs = [(tmp_path / name / "out.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert outs[0] == outs[1]
    assert not kept.exists()


def test_codes_move_by_grid_steps_whatever_the_number_of_steps() -> None:
    mode = get_mode("codes")
    rates = {steps: mode.rate(mode.config(), steps) for steps in (10, 200, 1000)}
    assert rates == {10: 0.03, 200: pytest.approx(0.03), 1000: pytest.approx(0.006)}
    assert mode.rate(mode.config(rate=0.5), 1000) == 0.5
