"""Calibrated factorization of whole models: what it loses beside svd, budgets, and layers of other shapes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.statistics import StatisticsFile
from aicompress.errors import Problems, RecipeError
from aicompress.model.loading.load import load as load_model
from aicompress.model.loading.tokenizer import load_tokenizer
from aicompress.pipeline import steps
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.layerwise.plan import UNDECIDED, UNTRIED
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load
from aicompress.report.model import Report
from aicompress.report.plan import headline
from tests.pipeline.calibration.steps import text

WINDOW = 32


def planned(
    source: Path,
    out: Path,
    method: dict[str, Any],
    data: dict[str, Any] | None = None,
    request: Request | None = None,
    command: str = "factorize",
    **more: Any,
) -> Any:
    calibration = {} if data is None else {"calibration": data}
    recipe = out.with_suffix(".yaml")
    recipe.write_text(json.dumps({"version": 1, "method": method, "report": {"html": False}, **calibration, **more}))
    return steps.make_plan(source, Destination(out), load(str(recipe), command), command, request)


def run(source: Path, out: Path, method: dict[str, Any], data: dict[str, Any] | None = None, **more: Any) -> Report:
    said: list[str] = more.pop("said", [])
    options = Options(latency="off", progress=lambda what, done, total: said.append(what))
    return steps.run(planned(source, out, method, data, **more), options)


@torch.inference_mode()
def divergence(folder: Path, source: Path, held: Path) -> float:
    """KL of a model's next tokens to the original's on a text."""
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    ids = torch.tensor(tokenizer(held.read_text())["input_ids"][: 16 * WINDOW]).view(-1, WINDOW)
    wanted, got = (load_model(path)(ids).logits.float().log_softmax(-1) for path in (source, folder))
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


def ranks(report: Report) -> dict[str, Any]:
    return {row.name: row.detail["rank"] for row in report.layers if row.method != "-"}


def test_the_model_changes_less_than_with_svd_and_less_with_tuned_blocks(
    tmp_path: Path, trained_llama: Path, text_file: Path, heldout_file: Path
) -> None:
    data, lost = text(text_file, samples=32), {}
    tune = {"steps": 30, "batch": 4, "factor_rate": 0.03}
    for name, more in {"svd": {}, "whitened": {}, "tuned": {"tune": tune}}.items():
        method = {"name": "svd" if name == "svd" else "whitened", "keep": 0.6}
        report = run(trained_llama, tmp_path / name, method, None if name == "svd" else data, **more)
        assert "full" not in ranks(report).values()
        assert all("less would be lost in no more bytes at 8 bits" in row.note for row in report.layers if row.detail)
        assert [line for line in report.warnings if "lose less if they were quantized, in no more bytes" in line]
        lost[name] = divergence(tmp_path / name, trained_llama, heldout_file)
    assert lost["whitened"] < 0.8 * lost["svd"]
    assert lost["tuned"] < 0.9 * lost["whitened"]


def test_output_gradients_make_it_change_less(
    tmp_path: Path, trained_llama: Path, text_file: Path, heldout_file: Path
) -> None:
    """The same with ranks that all layers share out, in as many bytes."""
    data, method = text(text_file, samples=16), {"name": "two_sided", "keep": 0.6}
    lost: dict[str, float] = {}
    for name, fields in {"whitened": {"name": "whitened"}, "uniform": {}, "auto": {"ranks": "auto"}}.items():
        run(trained_llama, tmp_path / name, {**method, **fields}, data)
        lost[name] = divergence(tmp_path / name, trained_llama, heldout_file)
    assert lost["auto"] < lost["uniform"] < lost["whitened"]
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in ("auto", "uniform")]
    assert sizes[0] <= sizes[1] * 1.01


def test_files_of_statistics_give_what_the_model_gives(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    method = {"name": "two_sided", "keep": 0.6, "ranks": "auto", "shift": 0}
    data = {**text(text_file, samples=4), "activations": "original", "precision": "float32"}
    request = Request(stats=(tmp_path / "stats.safetensors",))
    said: list[str] = []
    for name, given in (("direct", None), ("collecting", request), ("reading", request)):
        run(trained_llama, tmp_path / name, method, data, request=given, **({} if given else {"said": said}))
    assert "gradients" in said  # of the survey, and no more of them in the run
    assert not any(what.startswith("gradients, step") for what in said)
    moments = StatisticsFile.open(request.stats[0]).gradients("model.layers.0.mlp.up_proj")
    assert moments is not None
    assert moments.square is not None  # a file that is kept serves other methods, too
    one, *others = (Checkpoint.open(tmp_path / name) for name in ("direct", "collecting", "reading"))
    for name in one.manifest.entries:
        for other in others:
            torch.testing.assert_close(other.dense(name), one.dense(name), atol=1e-4, rtol=1e-3)


def test_a_budget_is_kept_by_ranks_that_calibration_decides(
    tmp_path: Path, trained_llama: Path, text_file: Path
) -> None:
    budget, data = 150_000, text(text_file, samples=8)
    method = {"name": "whitened", "target_bytes": budget}
    plan = planned(trained_llama, tmp_path / "plan", method, data)
    assert UNDECIDED in plan.warnings
    assert "→ about " in headline(plan.summary())
    report = run(trained_llama, tmp_path / "out", method, data)
    assert UNDECIDED not in report.warnings
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) <= budget
    by_weights = run(trained_llama, tmp_path / "plain", {"name": "svd", "target_bytes": budget})
    assert ranks(report) != ranks(by_weights)


def test_the_fewest_bytes_within_a_divergence(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    """What the model loses with the ranks that were found is as much as was allowed, and not much less."""
    method, data = {"name": "two_sided", "max_kl": 0.1}, text(text_file, samples=32)
    with pytest.raises((RecipeError, Problems), match="max_kl needs calibration data"):
        planned(trained_llama, tmp_path / "no data", method)
    plan = planned(trained_llama, tmp_path / "out", method, data)
    assert UNTRIED in plan.warnings
    assert "→ at most " in headline(plan.summary())
    assert {layer.config.shift for layer in plan.layers if layer.config is not None} == {0.0}
    start = time.perf_counter()
    said: list[str] = []
    report = run(trained_llama, tmp_path / "out", method, data, said=said)
    assert not any(what.startswith("block ") for what in said)  # what was tried is written, without another pass
    assert report.seconds > 0.5 * (time.perf_counter() - start)  # what decides on ranks is a part of the step
    assert UNTRIED not in report.warnings
    told = next(float(line.split()[4]) for line in report.notes if line.startswith("max_kl: the outputs lose"))
    assert 0.09 < told <= 0.1
    assert 0.05 < divergence(tmp_path / "out", trained_llama, text_file) < 0.11
    assert len(set(ranks(report).values())) > 3
    assert report.calibration["data"]


def test_a_chain_loses_no_more_than_its_steps(
    tmp_path: Path, trained_llama: Path, text_file: Path, heldout_file: Path
) -> None:
    """Factors rounded to 8 bits: at most the divergence of both steps together and a tenth; at 4 bits it is more."""
    few, low_rank = {"name": "rtn", "bits": 8, "group_size": 16, "pad": True}, {"name": "whitened", "keep": 0.8}
    run(trained_llama, tmp_path / "thin", low_rank, text(text_file, samples=8))
    run(trained_llama, tmp_path / "codes", few, command="quantize")
    run(tmp_path / "thin", tmp_path / "both", few, command="quantize")
    lost = {name: divergence(tmp_path / name, trained_llama, heldout_file) for name in ("thin", "codes", "both")}
    assert lost["codes"] < lost["both"] <= 1.1 * (lost["thin"] + lost["codes"])
    written = {name: sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in lost}
    assert written["both"] < written["codes"] < written["thin"]


@pytest.mark.parametrize("name", ["two_sided", "whitened"])
def test_a_plan_says_whose_outputs_are_not_seen(tmp_path: Path, tiny_llama: Path, text_file: Path, name: str) -> None:
    data, method = text(text_file, samples=2), {"name": name, "keep": 0.5}
    warnings = planned(tiny_llama, tmp_path / "out", method, data, select={"kinds": ["embedding", "linear"]}).warnings
    told = [line.rpartition(": ")[2] for line in warnings if "are not weighed against each other" in line]
    assert told == (["model.embed_tokens"] if name == "two_sided" else [])


def test_states_have_no_divergence(tmp_path: Path, tiny_bert: Path, text_file: Path) -> None:
    with pytest.raises(RecipeError, match="max_kl needs a model that gives logits"):
        run(tiny_bert, tmp_path / "out", {"name": "svd", "max_kl": 0.05}, text(text_file, samples=2))


@pytest.mark.parametrize("source", ["tiny_gpt2", "tiny_mixtral", "tiny_bert"])
def test_layers_of_other_shapes(tmp_path: Path, request: pytest.FixtureRequest, text_file: Path, source: str) -> None:
    """Transposed and fused matrices, experts that few tokens reach, biases."""
    model = request.getfixturevalue(source)
    method = {"name": "two_sided", "keep": 0.9, "ranks": "auto"} if source == "tiny_mixtral" else {"name": "whitened"}
    report = run(model, tmp_path / "out", {"keep": 0.9, **method}, text(text_file, samples=4))
    assert min(row.detail["rank"] for row in report.layers if row.form == "low_rank") > 1
    assert "low_rank" in {row.form for row in report.layers}
    before, after = (Checkpoint.open(path).parameters() for path in (model, tmp_path / "out"))
    assert {name: spec.shape for name, spec in before.items()} == {name: spec.shape for name, spec in after.items()}
    load_model(tmp_path / "out")


@pytest.mark.parametrize("name", ["whitened", "activation"])
def test_rows_of_an_embedding_count_as_often_as_the_text_has_them(
    tmp_path: Path, trained_llama: Path, text_file: Path, heldout_file: Path, name: str
) -> None:
    """Its rows on another text lose less than with svd at one rank; a token that was never seen keeps a fair row."""
    tokenizer = load_tokenizer(trained_llama)
    assert tokenizer is not None
    seen, held = (
        torch.bincount(torch.tensor(tokenizer(path.read_text())["input_ids"]), minlength=256).double()
        for path in (text_file, heldout_file)
    )
    embeddings, data = {"select": {"kinds": ["embedding"]}}, text(text_file, samples=32)
    request = Request(stats=(tmp_path / "stats.safetensors",))
    run(trained_llama, tmp_path / "svd", {"name": "svd", "rank": 12}, **embeddings)
    report = run(trained_llama, tmp_path / "out", {"name": name, "rank": 12}, data, **embeddings)
    given = {"name": name, "rank": 12, "shift": 0}
    files = ("collecting", "reading") if name == "whitened" else ()
    for folder in files:
        run(trained_llama, tmp_path / folder, given, data, request=request, **embeddings)
    plain, ours, *from_files, original = (
        Checkpoint.open(path).dense("model.embed_tokens.weight").double()
        for path in (*(tmp_path / folder for folder in ("svd", "out", *files)), trained_llama)
    )
    lost = {key: (original - dense).square().sum(dim=1) for key, dense in (("plain", plain), ("ours", ours))}
    assert (held * lost["ours"]).sum() < 0.85 * (held * lost["plain"]).sum()
    never = seen == 0
    assert never.any()
    assert lost["ours"][never].sum() < 0.97 * original[never].square().sum()
    assert "data-free" not in report.layers[0].note
    for found in from_files:
        torch.testing.assert_close(found, ours, rtol=1e-3, atol=1e-4)
    assert load_model(tmp_path / "out")(torch.tensor([[3, 4]])).logits.isfinite().all()
