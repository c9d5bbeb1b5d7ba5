"""Layers that store a part of their weights once: in the file, in the report, and in the steps that follow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError
from aicompress.model.loading.load import load as load_model
from aicompress.pipeline import export, steps
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.run import run as distil
from aicompress.pipeline.inspect import inspect
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.verify import verify
from aicompress.recipe import distillation, load
from aicompress.recipe.made import ExportRecipe
from aicompress.report.model import Report
from aicompress.weights import LowRank, Tied
from tests.inputs import once
from tests.pipeline.calibration.steps import text
from tests.pipeline.ranks import Ranks
from tests.pipeline.steps import prune

IDS = torch.arange(2, 26).reshape(2, 12)
LAYER = "model.layers.{}.{}_proj.weight".format
FREE = {"name": "stack", "keep": 0.5, "whiten": False}


@pytest.fixture(scope="session")
def stacked(built: Path, tiny_llama: Path) -> Path:
    """The tiny Llama with one right factor for query, key and value, and one for gate and up."""

    def make(path: Path) -> Path:
        run(tiny_llama, path, FREE)
        return path

    return once(built / "llama-stacked", make)


@pytest.fixture(scope="session")
def copied(built: Path, tiny_llama: Path) -> Path:
    """The tiny Llama whose last block has the weights of its first, but for one that is nearly the same."""

    def make(path: Path) -> Path:
        shutil.copytree(tiny_llama, path)
        tensors = load_file(path / "model.safetensors")
        tensors |= {
            name: tensors[name.replace("layers.2", "layers.0")].clone() for name in tensors if "layers.2" in name
        }
        tensors[LAYER(2, "mlp.up")] *= 1.01
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return once(built / "llama-copied", make)


@pytest.fixture(scope="session")
def tied(built: Path, copied: Path) -> Path:
    """That one with the layers that are equal stored once."""

    def make(path: Path) -> Path:
        run(copied, path, {"name": "tie"})
        return path

    return once(built / "llama-copied-tied", make)


def made(
    source: Path,
    out: Path,
    method: dict[str, Any],
    data: dict[str, Any] | None = None,
    command: str = "factorize",
    shard: int | None = None,
    **more: Any,
) -> Any:
    """The plan of a step."""
    recipe, calibration = out.with_suffix(".yaml"), {} if data is None else {"calibration": data}
    recipe.write_text(json.dumps({"version": 1, "method": method, "report": {"html": False}, **calibration, **more}))
    return steps.make_plan(source, Destination(out, shard), load(str(recipe), command), command, None)


def run(source: Path, out: Path, method: dict[str, Any], data: dict[str, Any] | None = None, **more: Any) -> Report:
    """The report of a step."""
    return steps.run(made(source, out, method, data, **more), Options(latency="off"))


def require_whole(report: Report, folder: Path) -> None:
    """Rows add up to the file, and what is written is sound."""
    kinds = report.after.by_kind
    assert sum(row.bytes_after for row in report.layers) + kinds["other"] + kinds["header"] == report.after.weight_bytes
    assert verify(folder).problems == ()


def test_a_shared_factor_is_stored_and_counted_once(tiny_llama: Path, tmp_path: Path) -> None:
    """Keys and values are narrower than queries; a layer that is excluded is in no group."""
    plan = made(tiny_llama, tmp_path / "out", FREE, select={"exclude": ["*layers.1.self_attn.k_proj"]})
    report = run(tiny_llama, tmp_path / "out", FREE, select={"exclude": ["*layers.1.self_attn.k_proj"]})
    require_whole(report, tmp_path / "out")
    assert plan.output.weight_bytes == report.after.weight_bytes
    assert any("6 of 20 layers share no tensor" in note for note in plan.notes)
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert described["format_version"] == 2  # versions that know nothing of sharing say that they are too old
    inner = {name for name in Checkpoint.open(tmp_path / "out").tensors if name.endswith("weight_in")}
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert len(inner) == 3 * 2 + 3 * 2
    query, value = (checkpoint.weight(LAYER(1, f"self_attn.{part}")) for part in "qv")
    assert torch.equal(query.inner.dense(), value.inner.dense())
    rank = int(0.5 * 64 * 128 / (64 + 128))
    assert checkpoint.weight(LAYER(0, "self_attn.k")).rank == rank
    rows = {row.name: row for row in inspect(tmp_path / "out").rows}
    assert sum(row.nbytes for row in rows.values()) + report.after.by_kind["header"] == report.after.weight_bytes
    assert "in of model.layers.0.self_attn.k_proj" in rows["model.layers.0.self_attn.q_proj"].detail
    assert rows["model.layers.0.self_attn.q_proj"].numbers == 64 * rank


def test_calibrated_in_shards(tiny_llama_bf16: Path, text_file: Path, tmp_path: Path) -> None:
    """The layer that stores the factor may lie in another file; outputs count by their gradients."""
    data = text(text_file, samples=4)
    report = run(tiny_llama_bf16, tmp_path / "out", {"name": "stack", "keep": 0.6, "gradients": True}, data, shard=6000)
    require_whole(report, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    with torch.inference_mode():
        model = load_model(tmp_path / "out", kernels="reference")
        assert torch.isfinite(model(IDS).logits).all()


def test_blocks_share_a_basis_that_the_original_model_gives(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Levels say how many blocks share; nothing is left of the statistics."""
    method, data = {"name": "shared_basis", "keep": 0.5}, text(text_file, samples=4)
    levels = [{"layers": "0-1", "blocks": 2}, {"layers": "2", "blocks": 1}]
    report = run(tiny_llama, tmp_path / "out", method, data, levels=levels)
    require_whole(report, tmp_path / "out")
    assert report.calibration["statistics"] == []
    assert sum("stored with model.layers.0" in row.note for row in report.layers) == 7
    assert len([name for name in Checkpoint.open(tmp_path / "out").tensors if name.endswith("weight_in")]) == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.yaml"]


def test_a_base_with_differences_and_its_later_steps(tiny_llama: Path, tmp_path: Path) -> None:
    """Two of three blocks have a base; a quantization works on it once, and on each difference."""
    report = run(tiny_llama, tmp_path / "out", {"name": "base_delta", "keep": 0.8, "whiten": False})
    require_whole(report, tmp_path / "out")
    (told,) = report.warnings
    assert told.startswith("layers that would lose less if they were quantized, in no more bytes: 14, such as model.")
    assert sum(row.form == "base_delta" for row in report.layers) == 14
    assert sum(row.note == "left as it is" for row in report.layers) == 8
    after = run(
        tmp_path / "out", tmp_path / "w8", {"name": "rtn", "bits": 8, "granularity": "channel"}, command="quantize"
    )
    require_whole(after, tmp_path / "w8")
    first, second = (Checkpoint.open(tmp_path / "w8").weight(LAYER(block, "mlp.up")) for block in (0, 1))
    assert first.parts()["base"].form == "int_grouped"
    assert torch.equal(first.parts()["base"].dense(), second.parts()["base"].dense())
    with torch.inference_mode():
        for folder in ("out", "w8"):
            fast, plain = (load_model(tmp_path / folder, kernels=kernels) for kernels in ("fast", "reference"))
            wanted = plain(IDS).logits
            assert (fast(IDS).logits - wanted).norm() < 2e-2 * wanted.norm()
    ups = [
        layer.mlp.up_proj.stored["base"] for layer in load_model(tmp_path / "out", kernels="reference").model.layers[:2]
    ]
    assert ups[0] is ups[1]


def test_a_layer_of_zeros_beside_one_that_is_not(tiny_llama: Path, tmp_path: Path) -> None:
    """What it becomes is no share of nothing: its row says so, and the step goes on."""
    shutil.copytree(tiny_llama, tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors[LAYER(0, "self_attn.v")].zero_()
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    report = run(tmp_path / "in", tmp_path / "out", {"name": "base_delta", "keep": 0.8, "whiten": False})
    require_whole(report, tmp_path / "out")
    (row,) = [row for row in report.layers if row.rel_error is None]
    assert row.name == "model.layers.0.self_attn.v_proj"
    assert row.note.startswith("it was all zeros and is not now")


def test_like_layers_become_one(copied: Path, tmp_path: Path) -> None:
    exact = run(copied, tmp_path / "exact", {"name": "tie"})
    near = run(copied, tmp_path / "near", {"name": "tie", "threshold": 0.02})
    for report, folder, count in ((exact, "exact", 6), (near, "near", 7)):
        require_whole(report, tmp_path / folder)
        tied = [row for row in report.layers if row.form == "tied"]
        assert len(tied) == count
        assert all(row.bytes_after == 1 and "stored with model.layers.0" in row.note for row in tied)
        with torch.inference_mode():
            wanted, got = (load_model(path)(IDS).logits for path in (copied, tmp_path / folder))
        torch.testing.assert_close(got, wanted, atol=0 if folder == "exact" else 0.02, rtol=0)
    errors = {row.name: row.rel_error for row in near.layers if row.form == "tied"}
    assert errors.pop("model.layers.2.mlp.up_proj") == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert not any(errors.values())
    mean = run(copied, tmp_path / "mean", {"name": "tie", "threshold": 0.02, "value": "mean"})
    halves = [row.rel_error for row in mean.layers if row.name.endswith(("0.mlp.up_proj", "2.mlp.up_proj"))]
    assert halves == pytest.approx([0.005, 0.005], rel=0.02)


def test_like_layers_of_codes_become_one(copied: Path, tmp_path: Path) -> None:
    run(copied, tmp_path / "codes", {"name": "rtn", "bits": 8, "group_size": 16}, command="quantize")
    report = run(tmp_path / "codes", tmp_path / "tied", {"name": "tie"})
    require_whole(report, tmp_path / "tied")
    assert report.after.weight_bytes < 0.85 * report.before.weight_bytes
    with torch.inference_mode():
        wanted, *got = (
            load_model(tmp_path / name, kernels=kernels)(IDS).logits  # type: ignore[arg-type]
            for name, kernels in (("codes", "reference"), ("tied", "reference"), ("tied", "fast"))
        )
    assert torch.equal(got[0], wanted)
    assert (got[1] - wanted).norm() < 2e-2 * wanted.norm()


@pytest.mark.parametrize("method", [{"name": "rtn", "bits": 8}, {"name": "gptq", "bits": 8, "granularity": "channel"}])
def test_what_is_shared_is_quantized_once(
    stacked: Path, text_file: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """At the layer that stores it; those that share it follow, also where nothing selects them."""
    data = None if method["name"] == "rtn" else text(text_file, samples=4)
    report = run(stacked, tmp_path / "out", method, data, command="quantize", select={"exclude": ["*.q_proj"]})
    require_whole(report, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    query, key = (checkpoint.weight(LAYER(0, f"self_attn.{part}")) for part in "qk")
    assert isinstance(query, LowRank)
    assert isinstance(key, LowRank)
    assert query.inner.form == "int_grouped"
    assert torch.equal(query.inner.dense(), key.inner.dense())
    assert len([name for name in Checkpoint.open(tmp_path / "out").tensors if name.endswith("weight_in")]) == 12
    assert report.after.weight_bytes < report.before.weight_bytes


def test_a_tied_layer_follows_any_form(tied: Path, tmp_path: Path) -> None:
    report = run(tied, tmp_path / "out", {"name": "svd", "keep": 0.5})
    assert any("6 layers are stored once with another one" in note for note in report.notes)
    require_whole(report, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    follower = checkpoint.weight(LAYER(2, "mlp.gate"))
    assert isinstance(follower, Tied)
    assert follower.source.form == "low_rank"
    assert torch.equal(follower.dense(), checkpoint.weight(LAYER(0, "mlp.gate")).dense())
    with torch.inference_mode():
        logits = [load_model(tmp_path / "out", kernels=kernels)(IDS).logits for kernels in ("fast", "reference")]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_export_decodes_all(stacked: Path, tied: Path, tmp_path: Path) -> None:
    for source, out in ((stacked, "one"), (tied, "two")):
        plan = export.make_plan(source, Destination(tmp_path / out), ExportRecipe(version=1))
        assert plan.warnings == ()
        export.run(plan, Options(latency="off"))
        with torch.inference_mode():
            wanted, got = (load_model(path, kernels="reference")(IDS).logits for path in (source, tmp_path / out))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ({"name": "stack", "gradients": True}, {"target_bytes": 150_000}),
        ({"name": "shared_basis"}, {"target_bytes": 150_000}),
        ({"name": "stack"}, {"max_kl": 0.01}),
    ],
    ids=str,
)
def test_calibration_decides_the_ranks_of_groups(
    method: dict[str, Any], target: dict[str, Any], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = run(tiny_llama, tmp_path / "out", {**method, **target}, text(text_file, samples=4))
    require_whole(report, tmp_path / "out")
    assert report.after.weight_bytes <= target.get("target_bytes", report.before.weight_bytes - 1)
    ranks = {row.name: row.detail["rank"] for row in report.layers if row.method != "-"}
    assert len(set(ranks.values())) > 1
    if method["name"] == "stack":
        assert ranks["model.layers.1.self_attn.q_proj"] == ranks["model.layers.1.self_attn.v_proj"]
    if "max_kl" in target:
        (told,) = (note for note in report.notes if note.startswith("max_kl"))
        assert 0 < float(told.split()[4]) <= 0.01


def test_a_structural_step_tells_that_layers_part(stacked: Path, tmp_path: Path) -> None:
    report = prune(stacked, tmp_path / "out", name="depth", drop=(0,))
    assert any("no longer share" in warning for warning in report.warnings)
    assert not any(entry.shared for entry in Checkpoint.open(tmp_path / "out").manifest.entries.values())


def test_a_run_that_is_stopped_within_a_group_goes_on(stacked: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """The layer that stores the factor is written and noted; those that share it are not."""

    def stop(what: str, done: int, total: int) -> None:
        if what == LAYER(1, "self_attn.k"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps.run(made(tiny_llama, tmp_path / "out", FREE), Options(latency="off", progress=stop))
    steps.run(made(tiny_llama, tmp_path / "out", FREE), Options(latency="off", resume=True))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (stacked / "model.safetensors").read_bytes()


def test_two_processes_share_the_statistics(ranks: Ranks, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    method, data = {"name": "shared_basis", "keep": 0.5, "blocks": 3}, text(text_file, samples=4)
    run(tiny_llama, tmp_path / "one", method, data)
    ranks.together(tiny_llama, tmp_path / "two", tmp_path / "one.yaml", verb="factorize")
    assert verify(tmp_path / "two").problems == ()
    one, two = (Checkpoint.open(tmp_path / name) for name in ("one", "two"))
    assert one.manifest.entries == two.manifest.entries
    for name in one.parameters():
        torch.testing.assert_close(two.dense(name), one.dense(name), rtol=1e-3, atol=1e-3)


def test_what_is_shared_is_trained_once(stacked: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = {"steps": 2, "batch": 4, "learning_rate": 1e-2, "precision": "fp32"}
    plain = {"version": 1, "method": {"name": "kl"}, "training": settings}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**plain, "data": {"text": str(text_file), "length": 32}}))
    recipe = distillation.load(str(tmp_path / "recipe.yaml"))
    plan = make_plan(stacked, tiny_llama, Destination(tmp_path / "out"), recipe)
    require_whole(distil(plan, Options(latency="off")), tmp_path / "out")
    query, key = (Checkpoint.open(tmp_path / "out").weight(LAYER(0, f"self_attn.{part}")) for part in "qk")
    before = Checkpoint.open(stacked).weight(LAYER(0, "self_attn.k"))
    assert torch.equal(query.parts()["in"].dense(), key.parts()["in"].dense())
    assert not torch.equal(before.parts()["in"].dense(), key.parts()["in"].dense())


def test_what_blocks_share_stays_whole_where_a_student_is_divided(
    ranks: Ranks, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    method, data = {"name": "shared_basis", "keep": 0.5, "blocks": 3}, text(text_file, samples=4)
    run(tiny_llama, tmp_path / "basis", method, data)
    settings = {"steps": 2, "batch": 4, "learning_rate": 1e-2, "precision": "fp32", "shard": True}
    plain = {"version": 1, "method": {"name": "kl"}, "training": settings}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**plain, "data": {"text": str(text_file), "length": 32}}))
    plan = make_plan(tmp_path / "basis", tiny_llama, Destination(tmp_path / "one"), distillation.load(str(recipe)))
    distil(plan, Options(latency="off"))
    ranks.together(tmp_path / "basis", tmp_path / "two", recipe, "--teacher", str(tiny_llama), verb="distill")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-4)
    training = json.loads((tmp_path / "two" / "report.json").read_text())["training"]
    assert 0.5 < training["parameters_per_process"] / training["trained_parameters"] < 1


def test_a_lost_owner_is_named(tied: Path, tmp_path: Path) -> None:
    shutil.copytree(tied, tmp_path / "broken")
    tensors = load_file(tied / "model.safetensors")
    lost = LAYER(0, "self_attn.k")
    del tensors[lost]
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks"):
        Checkpoint.open(tmp_path / "broken")
    (problem,) = verify(tmp_path / "broken").problems
    assert lost in problem


def test_nothing_is_shared_where_no_input_is(tiny_gpt2: Path, tmp_path: Path) -> None:
    """GPT-2 keeps query, key and value in one matrix."""
    (note,) = made(tiny_gpt2, tmp_path / "out", FREE).notes
    assert note.startswith("no layer shares a tensor with another")
    (note,) = made(tiny_gpt2, tmp_path / "out", {"name": "tie"}).notes
    assert "left as they are" in note
