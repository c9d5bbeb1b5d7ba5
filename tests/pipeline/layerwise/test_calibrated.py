"""Calibrated steps: resumed at the last finished block, data-free where nothing was seen, recorded in the report."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from aicompress.checkpoint import Checkpoint
from aicompress.data import Data, token_windows
from aicompress.errors import RecipeError, Refused
from aicompress.layer import Layer
from aicompress.methods.capabilities import Batched
from aicompress.methods.quantize import gptq
from aicompress.model.kernels.linear import has_fast_bfloat16
from aicompress.model.loading.load import load
from aicompress.model.loading.tokenizer import load_tokenizer
from aicompress.pipeline.calibration import runner as engine
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.layerwise import calibrated
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.step.options import Options
from aicompress.report.model import Report
from tests.pipeline.calibration.steps import GPTQ, OFF, planned, run, text, write_recipe


def weights(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}


def stop_at(what: str) -> Any:
    """Progress that ends like a user's Ctrl-C."""

    def progress(told: str, done: int, total: int) -> None:
        if told == what:
            raise KeyboardInterrupt

    return progress


def require_resumed(source: Path, folder: Path, recipe: Path, where: str) -> None:
    """A run that is stopped there, and goes on, writes what one in one go writes."""
    run(source, folder / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        run(source, folder / "out", recipe, options=Options(latency="off", progress=stop_at(where)))
    run(source, folder / "out", recipe, options=Options(True, "off"))
    assert weights(folder / "out") == weights(folder / "whole")


def test_layers_that_share_inputs_are_compressed_jointly(
    tmp_path: Path, tiny_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, text(text_file), rules=[{"match": "*.k_proj", "bits": 8}])
    groups: list[list[str]] = []
    plan = planned(tiny_llama, tmp_path / "out", recipe)

    def batched(layers: list[Layer], config: Any) -> Any:
        groups.append([layer.info.name.rpartition(".")[2] for layer in layers])
        return gptq.batched(layers, config)

    layerwise.run(dataclasses.replace(plan, method=dataclasses.replace(plan.method, batched=Batched(batched))), OFF)
    assert groups[:2] == [["gate_proj", "up_proj"], ["q_proj", "v_proj"]]  # k_proj has other parameters
    apart = planned(tiny_llama, tmp_path / "apart", recipe)
    layerwise.run(dataclasses.replace(apart, method=dataclasses.replace(apart.method, batched=None)), OFF)
    one, other = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tmp_path / "apart")
    for name in one.parameters():
        torch.testing.assert_close(one.dense(name), other.dense(name))


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_the_report_says_how_products_were_computed(
    tmp_path: Path, tiny_llama: Path, text_file: Path, precision: str
) -> None:
    recipe = write_recipe(tmp_path, {**text(text_file, samples=2), "precision": precision})
    report = run(tiny_llama, tmp_path / "out", recipe)
    fast = precision == "auto" and has_fast_bfloat16()
    assert report.calibration["products"] == ("bfloat16" if fast else "float32")
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"method": {**GPTQ, "shift": 0.5}}, "shift"),
        ({"tune": {"steps": 2}}, "tune"),
    ],
)
def test_one_pass_gives_nothing_to_compare_with(
    tmp_path: Path, tiny_llama: Path, text_file: Path, more: dict[str, Any], what: str
) -> None:
    recipe = write_recipe(tmp_path, {**text(text_file), "activations": "original"}, **more)
    with pytest.raises(RecipeError, match=f"{what}: it compares") as found:
        planned(tiny_llama, tmp_path / "out", recipe)
    assert what in str(found.value.hint)


def test_one_pass_takes_the_statistics_of_the_original_model(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    """What a file of statistics holds, collected from the model as it is."""
    once = write_recipe(tmp_path, {**text(text_file), "activations": "original"})
    report = run(tiny_llama, tmp_path / "once", once)
    assert report.calibration["activations"] == "original"
    run(tiny_llama, tmp_path / "read", once, request=Request(stats=(tmp_path / "s.safetensors",)))
    run(tiny_llama, tmp_path / "twice", write_recipe(tmp_path, text(text_file)))
    assert weights(tmp_path / "once") == weights(tmp_path / "read") != weights(tmp_path / "twice")


@pytest.mark.parametrize("where", ["block 1 of 3", "model.layers.1.mlp.down_proj.weight"])
def test_a_stopped_run_goes_on_at_its_last_finished_block(
    tmp_path: Path, tiny_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    recipe = write_recipe(tmp_path, text(text_file))
    whole = run(tiny_llama, tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_llama, tmp_path / "out", recipe, options=Options(latency="off", progress=stop_at(where)))
    visited: list[str] = []
    write = calibrated.write

    def noted(work: Any, name: str, *rest: Any) -> Any:
        visited.append(name)
        return write(work, name, *rest)

    monkeypatch.setattr(calibrated, "write", noted)
    told: list[tuple[str, int, int]] = []
    resumed = Options(True, "off", lambda what, done, total: told.append((what, done, total)))
    report = run(tiny_llama, tmp_path / "out", recipe, options=resumed)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert visited
    assert not any(".layers.0." in name for name in visited)
    assert [row.rel_error for row in report.layers] == [row.rel_error for row in whole.layers]
    assert "block 3 of 3" in [what for what, _, _ in told]
    assert max(done for _, done, _ in told) == told[-1][2]


def test_a_run_that_was_stopped_after_its_last_block_runs_no_model(
    tmp_path: Path, tiny_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, text(text_file))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_llama, tmp_path / "out", recipe, options=Options(latency="off", progress=stop_at("block 3 of 3")))
    monkeypatch.setattr(engine, "walk", None)
    run(tiny_llama, tmp_path / "out", recipe, options=Options(True, "off"))
    assert Checkpoint.open(tmp_path / "out")


def test_resuming_with_other_calibration_data_is_refused(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    own = tmp_path / "text.txt"
    own.write_text(text_file.read_text())
    recipe = write_recipe(tmp_path, text(own))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_llama, tmp_path / "out", recipe, options=Options(latency="off", progress=stop_at("block 1 of 3")))
    own.write_text(text_file.read_text() + "One more sentence.\n")
    with pytest.raises(Refused, match="another input, recipe or version"):
        run(tiny_llama, tmp_path / "out", recipe, options=Options(True, "off"))


def test_the_report_records_the_calibration_data(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    report = run(tiny_llama, tmp_path / "out", write_recipe(tmp_path, text(text_file), seed=3))
    (data,) = report.calibration["data"]
    assert data["sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert (data["path"], data["samples"], data["seed"]) == (text_file.name, 8, 3)
    assert Report.from_json((tmp_path / "out" / "report.json").read_text()).calibration == report.calibration
    assert not report.warnings[:-1]  # the last one says that latency is off


@pytest.mark.parametrize("fixture", ["tiny_mixtral", "tiny_qwen_moe"])
def test_experts_that_saw_too_little_are_data_free(
    tmp_path: Path, text_file: Path, fixture: str, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(fixture)
    select = {"include": ["model.layers.*"]}
    method = {**GPTQ, "group_size": 8}
    recipe = write_recipe(tmp_path, text(text_file, samples=1), select=select, method=method)
    report = run(source, tmp_path / "out", recipe)
    rows = {row.name: row for row in report.layers if row.method == "gptq"}
    scarce = [name for name, row in rows.items() if "calibration rows: data-free" in row.note]
    assert scarce
    assert all(".experts." in name for name in scarce)
    assert len(scarce) < sum(".experts." in name for name in rows)
    assert all(row.rel_error is not None and 0 < row.rel_error < 0.3 for row in rows.values())
    (warning,) = [line for line in report.warnings if "data-free" in line]
    assert f"{len(scarce)} of {len(rows)} layers saw fewer than 16 calibration rows" in warning
    with torch.no_grad():
        logits = load(tmp_path / "out")(torch.arange(5, 25)[None]).logits
    assert torch.isfinite(logits).all()


def test_layers_that_are_no_modules_are_data_free(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    """The embedding is given token numbers: nothing can be learnt of its inputs."""
    select = {"include": ["*.layers.0.mlp.*", "*embed_tokens"], "kinds": ["linear", "embedding"]}
    report = run(tiny_llama, tmp_path / "out", write_recipe(tmp_path, text(text_file), select=select))
    notes = {row.name: row.note for row in report.layers if row.method == "gptq"}
    assert notes.pop("model.embed_tokens").startswith("0 calibration rows: data-free")
    assert len(notes) == 3
    assert not any(notes.values())


def test_progress_tells_of_blocks(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    told: list[str] = []
    options = Options(latency="off", progress=lambda what, done, total: told.append(what))
    run(tiny_llama, tmp_path / "out", write_recipe(tmp_path, text(text_file)), options=options)
    assert [what for what in told if what.startswith("block")] == [f"block {n} of 3" for n in (1, 2, 3)]


def inputs_of(folder: Path, path: str, ids: torch.Tensor) -> torch.Tensor:
    """What a layer is given, (tokens, in)."""
    model = load(folder, kernels="reference")
    seen: list[torch.Tensor] = []
    model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    return seen[0].flatten(0, 1)


def test_a_target_that_makes_up_for_earlier_layers(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    """In the first block both models have the same inputs; in later ones the target is what the original gives."""
    for shift in (0, 1):
        recipe = write_recipe(tmp_path, text(text_file, samples=24), method={**GPTQ, "bits": 3, "shift": shift})
        run(trained_llama, tmp_path / f"out-{shift}", recipe)
    plain, moved = (Checkpoint.open(tmp_path / f"out-{shift}") for shift in (0, 1))
    changed = {name for name in plain.manifest.entries if not torch.equal(plain.dense(name), moved.dense(name))}
    assert changed
    assert not any(".layers.0." in name for name in changed)
    ids, _ = token_windows(Data(**text(text_file, samples=24)), load_tokenizer(trained_llama), 0)
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj"):
        wanted = inputs_of(trained_llama, name, ids) @ Checkpoint.open(trained_llama).dense(f"{name}.weight").t()
        errors = []
        for shift, found in enumerate((plain, moved)):
            given = inputs_of(tmp_path / f"out-{shift}", name, ids)
            errors.append((wanted - given @ found.dense(f"{name}.weight").t()).square().sum())
        assert errors[1] < errors[0]
    with pytest.raises(Refused, match="compares two models"):
        run(trained_llama, tmp_path / "out", recipe, Request(stats=(tmp_path / "stats.safetensors",)))
