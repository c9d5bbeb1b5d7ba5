"""Calibrated structural steps: what stays is chosen block by block and what reads it is made anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.data import Data, token_windows
from aicompress.errors import CompressError
from aicompress.model.loading.tokenizer import load_tokenizer
from aicompress.pipeline.calibration import runner as engine
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.structured import planner as structure_planner
from aicompress.pipeline.structured import run as structure
from aicompress.recipe import load
from aicompress.report.model import Report
from tests.pipeline.calibration.steps import OFF, text
from tests.pipeline.ranks import Ranks

OBS = {"name": "width", "sparsity": 0.5, "score": "obs", "damping": 1e-6}


def recipe(folder: Path, data: dict[str, Any] | None, method: dict[str, Any], **sections: Any) -> Path:
    path = folder / "prune.yaml"
    calibration = {} if data is None else {"calibration": data}
    path.write_text(json.dumps({"version": 1, "method": method, **calibration, **sections}))
    return path


def prune(source: Path, out: Path, path: Path, request: Request | None = None) -> Report:
    planned = structure_planner.make_plan(source, Destination(out), load(str(path), "prune"), "prune", request)
    report = structure.run(planned, OFF)
    assert planned.output.weight_bytes == report.after.weight_bytes
    return report


def windows(source: Path, file: Path, samples: int = 8) -> Tensor:
    return token_windows(Data.model_validate(text(file, samples)), load_tokenizer(source), 0)[0]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found = model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return found[0]


def divergence(source: Path, out: Path, ids: Tensor) -> float:
    """KL(before ‖ after) per token."""
    before, after = (
        logits(hf.AutoModelForCausalLM.from_pretrained(folder), ids).log_softmax(-1) for folder in (source, out)
    )
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("method", [{}, {"shift": 0.7}], ids=["plain", "shifted"])
def test_the_first_block_is_least_squares_on_its_real_inputs(
    tmp_path: Path, tiny_llama: Path, text_file: Path, method: dict[str, Any]
) -> None:
    prune(
        tiny_llama, tmp_path / "out", recipe(tmp_path, {**text(text_file), "precision": "float32"}, {**OBS, **method})
    )
    model, narrow = (hf.AutoModelForCausalLM.from_pretrained(path) for path in (tiny_llama, tmp_path / "out"))
    seen: list[Tensor] = []
    before, after = model.model.layers[0].mlp, narrow.model.layers[0].mlp
    before.down_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten(0, 1)))
    logits(model, windows(tiny_llama, text_file))
    rows = seen[0].double()
    kept = [(before.gate_proj.weight == row).all(dim=1).nonzero().item() for row in after.gate_proj.weight]
    assert kept == sorted(kept)
    assert len(kept) == 64
    expected = torch.linalg.lstsq(rows[:, kept], rows @ before.down_proj.weight.double().t()).solution
    torch.testing.assert_close(after.down_proj.weight.double().t(), expected, atol=1e-3, rtol=1e-2)


def test_obs_loses_less_than_any_other_score(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    ids = windows(trained_llama, text_file, 16)
    found = {}
    for name, method in {
        "norm": {"score": "product"},
        "activation": {"score": "activation"},
        "refitted": {"score": "activation", "refit": True},
        "obs": {"score": "obs"},
    }.items():
        path = recipe(tmp_path, text(text_file, 32), {"name": "width", "sparsity": 0.5, **method})
        prune(trained_llama, tmp_path / name, path)
        found[name] = divergence(trained_llama, tmp_path / name, ids)
    assert found["obs"] < found["refitted"] < min(found["norm"], found["activation"])
    assert found["obs"] < 0.5 * found["norm"]


@pytest.mark.parametrize("fixture", ["tiny_gpt2", "tiny_bert", "tiny_t5", "tiny_mixtral", "tiny_llama_bf16"])
def test_families(tmp_path: Path, text_file: Path, fixture: str, request: pytest.FixtureRequest) -> None:
    """Fused, transposed, biased, tied, sharded, of experts: loads in plain transformers, and beats the norms."""
    source: Path = request.getfixturevalue(fixture)
    auto = hf.AutoModel if fixture in ("tiny_bert", "tiny_t5") else hf.AutoModelForCausalLM
    ids = windows(source, text_file)
    before = logits(auto.from_pretrained(source, dtype=torch.float32), ids)
    error = {}
    for score in ("obs", "product"):
        method = {"name": "width", "sparsity": 0.5, "score": score}
        report = prune(source, tmp_path / score, recipe(tmp_path, text(text_file), method))
        found, info = auto.from_pretrained(tmp_path / score, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info
        error[score] = float((logits(found, ids) - before).norm())
        assert report.after.parameters < report.before.parameters
        assert bool(report.calibration) == (score == "obs")
    assert error["obs"] < error["product"]


def test_the_bias_takes_up_the_mean(tmp_path: Path, tiny_bert: Path, text_file: Path) -> None:
    prune(tiny_bert, tmp_path / "out", recipe(tmp_path, text(text_file), {**OBS, "sparsity": 0.9}))
    before, after = Checkpoint.open(tiny_bert), Checkpoint.open(tmp_path / "out")
    changed = {name for name in before.parameters() if not torch.equal(before.dense(name), after.dense(name))}
    assert {name.split(".", 3)[3] for name in changed} == {
        "intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight", "output.dense.bias",
    }  # fmt: skip


def test_a_file_of_statistics_is_collected_and_read(
    tmp_path: Path, tiny_gpt2: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = Request(stats=(tmp_path / "stats.safetensors",))
    one = prune(tiny_gpt2, tmp_path / "one", recipe(tmp_path, text(text_file), OBS), stats)
    monkeypatch.setattr(engine, "walk", None)
    two = prune(tiny_gpt2, tmp_path / "two", recipe(tmp_path, None, OBS), stats)
    assert one.after.sha256 == two.after.sha256
    assert two.calibration["statistics"] == [str(stats.stats[0])]


@pytest.mark.parametrize(
    ("data", "fields", "stats", "reason"),
    [
        (False, {}, False, "width needs calibration data"),
        (True, {"score": "product"}, True, "width reads no statistics of inputs"),
        (True, {"shift": 1.0}, True, "width compares two models here"),
    ],
)
def test_what_is_missing_is_refused_before_work(
    tmp_path: Path, tiny_llama: Path, text_file: Path, data: bool, fields: dict[str, Any], stats: bool, reason: str
) -> None:
    path = recipe(tmp_path, text(text_file) if data else None, {**OBS, **fields})
    request = Request(stats=(tmp_path / "s.safetensors",) if stats else ())
    with pytest.raises(CompressError, match=reason):
        prune(tiny_llama, tmp_path / "out", path, request)
    assert [file.name for file in tmp_path.iterdir()] == ["prune.yaml"]


def test_experts_that_saw_too_little_are_told(tmp_path: Path, tiny_mixtral: Path, text_file: Path) -> None:
    report = prune(tiny_mixtral, tmp_path / "out", recipe(tmp_path, text(text_file, 1), OBS))
    (warning,) = [line for line in report.warnings if "data-free" in line]
    assert "of 24 saw fewer than 16 calibration rows" in warning
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_quantized_input_is_decoded_where_values_are_new(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    ints = tmp_path / "int8.yaml"
    ints.write_text(json.dumps({"version": 1, "method": {"name": "rtn", "bits": 8, "group_size": 16}}))
    made = planner.make_plan(tiny_llama, Destination(tmp_path / "int8"), load(str(ints), "quantize"), "quantize")
    layerwise.run(made, OFF)
    report = prune(tmp_path / "int8", tmp_path / "out", recipe(tmp_path, text(text_file), OBS))
    rows = {row.name: row for row in report.layers}
    assert rows["model.layers.0.mlp.down_proj"].form == "dense"
    assert rows["model.layers.0.mlp.up_proj"].form == "int_grouped"
    assert any("are decoded" in line for line in report.warnings)


def test_a_weight_that_is_not_finite_stops_the_run(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "in")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "in" / file).write_bytes((tiny_llama / file).read_bytes())
    with pytest.raises(CompressError, match=r"layers.2.mlp.down_proj.weight"):
        prune(tmp_path / "in", tmp_path / "out", recipe(tmp_path, text(text_file), OBS))
    assert not (tmp_path / "out").exists()


def test_two_processes_give_what_one_gives(tmp_path: Path, tiny_llama: Path, text_file: Path, ranks: Ranks) -> None:
    path = recipe(tmp_path, {**text(text_file, 9), "precision": "float32"}, {**OBS, "damping": 0.1})
    one = prune(tiny_llama, tmp_path / "one", path)
    ranks.together(tiny_llama, tmp_path / "two", path, verb="prune")
    two = Report.from_json((tmp_path / "two" / "report.json").read_text())
    assert (two.calibration["processes"], two.calibration["data"]) == (2, one.calibration["data"])
    alone, shared = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "two")
    for name in alone.parameters():
        torch.testing.assert_close(shared.dense(name), alone.dense(name), atol=1e-3, rtol=1e-3)
