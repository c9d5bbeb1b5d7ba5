"""A layer-wise run writes what was planned, can be stopped and resumed, and leaves nothing behind when it fails."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aicompress import __version__
from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.place import working_path
from aicompress.errors import CheckpointError, CompressError, Refused
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load
from aicompress.report.model import Report
from aicompress.weights import IntGrouped

OFF = Options(latency="off")
W8 = "quantize/rtn-w8"


def planned(source: Path, out: Path, recipe: str = W8, *overrides: str, **place: Any) -> Plan:
    command = recipe.split("/")[0]
    return planner.make_plan(source, Destination(out, **place), load(recipe, command, overrides), command)


def run(source: Path, out: Path, recipe: str = W8, *overrides: str, **place: Any) -> Report:
    return layerwise.run(planned(source, out, recipe, *overrides, **place), OFF)


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file but the reports, whose times differ from run to run."""
    files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder.parent if folder.is_file() else folder).as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in files
        if not path.name.startswith("report.")
    }


@pytest.fixture
def mlp(tmp_path: Path, mlp_file: Path) -> Path:
    return Path(shutil.copy(mlp_file, tmp_path / "mlp.safetensors"))


@pytest.mark.parametrize("model", ["tiny_llama", "mlp_file"])
@pytest.mark.parametrize("recipe", [W8, "factorize/svd-keep", "prune/magnitude-global"])
def test_equal_runs_give_equal_bytes(tmp_path: Path, request: Any, model: str, recipe: str) -> None:
    source: Path = request.getfixturevalue(model)
    suffix = ".safetensors" if source.is_file() else ""
    outs = [tmp_path / folder / f"out{suffix}" for folder in ("a", "b")]
    for out in outs:
        run(source, out, recipe)
    assert digest(outs[0]) == digest(outs[1])


@pytest.mark.parametrize("model", ["tiny_llama_bf16", "mlp_file"])
def test_the_input_is_never_touched(tmp_path: Path, request: Any, model: str) -> None:
    source: Path = request.getfixturevalue(model)
    before = digest(source)
    run(source, tmp_path / ("out.safetensors" if source.is_file() else "out"))
    assert digest(source) == before


def test_lineage_holds_every_step(tmp_path: Path, mlp: Path) -> None:
    run(mlp, tmp_path / "one.safetensors", "factorize/svd-keep", "seed=5")
    report = run(tmp_path / "one.safetensors", tmp_path / "two.safetensors", "quantize/rtn-w8")
    first, second = Checkpoint.open(tmp_path / "two.safetensors").manifest.lineage
    assert report.lineage == (first, second)
    assert (first["command"], first["seed"], first["tool"]) == ("factorize", 5, f"aicompress {__version__}")
    assert first["recipe"] == load("factorize/svd-keep", "factorize", ["seed=5"]).resolved()
    assert first["recipe_sha256"] == load("factorize/svd-keep", "factorize", ["seed=5"]).sha256()
    assert first["inputs"] == {"mlp.safetensors": hashlib.sha256(mlp.read_bytes()).hexdigest()}
    assert second["inputs"] == digest(tmp_path / "one.safetensors")


def test_lineage_of_a_directory_lies_beside_its_config(tmp_path: Path, tiny_llama_bf16: Path) -> None:
    run(tiny_llama_bf16, tmp_path / "one")
    run(tmp_path / "one", tmp_path / "two", "prune/magnitude-50")
    lineage = json.loads((tmp_path / "two" / "aicompress.json").read_text())["lineage"]
    assert [step["command"] for step in lineage] == ["quantize", "prune"]
    assert len(lineage[0]["inputs"]) >= 3


def test_the_report_knows_the_files(tmp_path: Path, tiny_llama: Path) -> None:
    report = run(tiny_llama, tmp_path / "out", max_shard_size=60_000)
    weights = {name: sha for name, sha in digest(tmp_path / "out").items() if name.endswith(".safetensors")}
    assert report.after.sha256 == weights
    assert len(weights) > 1
    files = [p for p in (tmp_path / "out").iterdir() if not p.name.startswith("report.")]
    assert report.after.bytes == sum(path.stat().st_size for path in files)
    assert sum(report.after.by_kind.values()) == report.after.weight_bytes
    assert Report.from_json((tmp_path / "out" / "report.json").read_text()).after == report.after


def stop_after(count: int) -> Any:
    """Progress that ends like a user's Ctrl-C."""
    seen: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        seen.append(what)
        if len(seen) == count:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("count", [1, 4, 9])
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path, tiny_llama: Path, count: int) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        layerwise.run(planned(tiny_llama, out), dataclasses.replace(OFF, progress=stop_after(count)))
    assert not out.exists()
    journal = working_path(out) / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"parameter": "model.nor')  # cut off by a kill
    done: list[str] = []
    resumed = Options(True, "off", lambda what, so_far, total: done.append(what))
    report = layerwise.run(planned(tiny_llama, out), resumed)
    whole = run(tiny_llama, tmp_path / "whole" / "out")
    assert digest(out) == digest(tmp_path / "whole" / "out")
    assert [row.name for row in report.layers] == [row.name for row in whole.layers]
    assert len(done) == len(Checkpoint.open(tiny_llama).tensors)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_resuming_another_step_is_refused_and_keeps_what_is_there(tmp_path: Path, tiny_llama: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        layerwise.run(planned(tiny_llama, out), dataclasses.replace(OFF, progress=stop_after(3)))
    before = digest(working_path(out))
    for other in (planned(tiny_llama, out, W8, "seed=1"), planned(tiny_llama, out, "prune/magnitude-50")):
        with pytest.raises(Refused, match="another input, recipe or version"):
            layerwise.run(other, Options(True, "off"))
    assert digest(working_path(out)) == before
    layerwise.run(planned(tiny_llama, out), Options(True, "off"))
    assert out.is_dir()


def test_resuming_with_nothing_to_resume_is_a_whole_run(tmp_path: Path, mlp: Path) -> None:
    layerwise.run(planned(mlp, tmp_path / "a.safetensors"), Options(True, "off"))
    run(mlp, tmp_path / "b" / "a.safetensors")
    assert digest(tmp_path / "a.safetensors") == digest(tmp_path / "b" / "a.safetensors")


@pytest.mark.parametrize("name", ["fc2.weight", "fc2.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_and_nothing_is_left(tmp_path: Path, mlp: Path, name: str, value: float) -> None:
    tensors = load_file(mlp)
    tensors[name].view(-1)[3] = value
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"'fc2.*' holds 1 NaN or infinite"):
        run(bad, tmp_path / "new" / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == before


def test_a_stored_scale_that_is_not_finite_is_refused(tmp_path: Path, mlp: Path) -> None:
    run(mlp, tmp_path / "one.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "one.safetensors")
    tensors = load_file(tmp_path / "one.safetensors")
    tensors["fc1.weight_scale"][0] = float("nan")
    save_file(tensors, tmp_path / "bad.safetensors", metadata=checkpoint.metadata)
    with pytest.raises(CheckpointError, match=r"'fc1.*' holds"):  # copied
        run(tmp_path / "bad.safetensors", tmp_path / "two.safetensors", W8, "select.include=[fc2]")
    with pytest.raises(CheckpointError, match=r"'fc1.*' holds"):  # quantized again
        run(tmp_path / "bad.safetensors", tmp_path / "two.safetensors", W8, "select.include=[fc1]")


def test_a_method_that_gives_infinity_fails_and_nothing_is_left(tmp_path: Path, mlp: Path) -> None:
    sound = planned(mlp, tmp_path / "out.safetensors")

    def apply(layer: Any, config: Any) -> IntGrouped:
        weight = sound.method.apply(layer, config)
        assert isinstance(weight, IntGrouped)
        return dataclasses.replace(weight, scale=weight.scale * torch.inf)

    broken = dataclasses.replace(sound, method=dataclasses.replace(sound.method, apply=apply))
    with pytest.raises(CompressError, match="not finite") as caught:
        layerwise.run(broken, OFF)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == [mlp]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
@pytest.mark.parametrize("recipe", [W8, "factorize/svd-keep", "prune/magnitude-50", "prune/magnitude-90-sparse"])
def test_every_floating_dtype_is_compressed(tmp_path: Path, dtype: torch.dtype, recipe: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64).to(dtype)
    save_file({"fc.weight": weight, "fc.bias": torch.ones(64).to(dtype)}, tmp_path / "in.safetensors")
    run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", recipe)
    written = Checkpoint.open(tmp_path / "out.safetensors")
    assert written.parameters() == Checkpoint.open(tmp_path / "in.safetensors").parameters()
    assert (written.dense("fc.weight").float() - weight.float()).norm() < weight.float().norm()
    assert written.dense("fc.bias").dtype is dtype


def tied(folder: Path, source: Path, change: float) -> Path:
    """The tied Llama with both copies in its file."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_tied_weights_that_are_stored_twice_are_written_and_counted_once(tmp_path: Path, tiny_llama: Path) -> None:
    twice = tied(tmp_path / "in", tiny_llama, 0.0)
    report, once = run(twice, tmp_path / "twice"), run(tiny_llama, tmp_path / "once")
    assert "lm_head.weight" not in load_file(tmp_path / "twice" / "model.safetensors")
    assert digest(tmp_path / "twice")["model.safetensors"] == digest(tmp_path / "once")["model.safetensors"]
    assert report.before is not None
    assert once.before is not None
    assert report.before.parameters == once.before.parameters == report.after.parameters
    assert sum(report.before.by_kind.values()) == report.before.weight_bytes > once.before.weight_bytes
    assert not report.warnings[:-1]


def test_tied_weights_that_differ_are_both_kept(tmp_path: Path, tiny_llama: Path) -> None:
    report = run(tied(tmp_path / "in", tiny_llama, 0.5), tmp_path / "out")
    assert any("lm_head.weight and model.embed_tokens.weight are tied" in warning for warning in report.warnings)
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_untied_weights_are_two_even_when_equal(tmp_path: Path, tiny_llama_untied: Path) -> None:
    run(tied(tmp_path / "in", tiny_llama_untied, 0.0), tmp_path / "out")
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")
