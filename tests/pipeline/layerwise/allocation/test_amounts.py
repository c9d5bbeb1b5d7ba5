"""Allocations that calibration decides: exact totals over the whole model, explicit numbers in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aicompress.checkpoint import Checkpoint
from aicompress.errors import Problems, RecipeError
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.layerwise.plan import UNDECIDED
from aicompress.report.plan import headline
from tests.pipeline.calibration.steps import text
from tests.pipeline.calibration.test_gradients import planned, run, write_recipe

SLACK = 34_000  # bytes that a plan sets aside for names and the manifest; little beside a model of real size


def survivors(folder: Path) -> dict[str, int]:
    checkpoint = Checkpoint.open(folder)
    names = [info.tensor for info in checkpoint.layers() if info.kind == "linear"]
    return {name: int((checkpoint.dense(name) != 0).sum()) for name in names}


@pytest.mark.parametrize(
    "method",
    [
        {"name": "wanda", "allocation": "owl", "scope": "layer"},
        {"name": "sparsegpt", "allocation": "auto"},
        {"name": "alps", "allocation": "global", "stages": 2, "store": "sparse"},
        {"name": "taylor", "allocation": "auto", "loss": "own", "refit": False},
        {"name": "taylor", "allocation": "global", "moment": "mean"},
    ],
    ids=lambda method: "-".join(str(value) for value in method.values()),
)
def test_the_total_is_exact_and_the_layers_differ(
    tmp_path: Path, trained_llama: Path, text_file: Path, method: dict[str, Any]
) -> None:
    recipe = write_recipe(tmp_path, text(text_file, samples=4), method={**method, "sparsity": 0.7})
    plan = planned(trained_llama, tmp_path / "out", recipe)
    assert UNDECIDED in plan.warnings
    assert ("→ about " in headline(plan.summary())) == (method.get("store") == "sparse")
    report = run(trained_llama, tmp_path / "out", recipe)
    counts = survivors(tmp_path / "out")
    sizes = {name: Checkpoint.open(trained_llama).dense(name).numel() for name in counts}
    assert sum(counts.values()) == sum(sizes.values()) - round(0.7 * sum(sizes.values()))
    assert len({round(counts[name] / sizes[name], 2) for name in counts}) > 1
    assert UNDECIDED not in report.warnings
    shown = {f"{row.name}.weight": row.detail["sparsity"] for row in report.layers if row.method != "-"}
    assert shown == {name: pytest.approx(1 - counts[name] / sizes[name], abs=1e-6) for name in counts}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_files_of_statistics_decide_as_the_model_does(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    method = {"name": "wanda", "sparsity": 0.7, "allocation": "auto", "scope": "layer"}
    recipe = write_recipe(tmp_path, text(text_file, samples=4), method=method)
    path = tmp_path / "stats.safetensors"
    run(trained_llama, tmp_path / "direct", recipe)
    run(trained_llama, tmp_path / "collecting", recipe, Request(stats=(path,)))
    run(trained_llama, tmp_path / "reading", write_recipe(tmp_path, None, method=method), Request(stats=(path,)))
    assert survivors(tmp_path / "direct") == survivors(tmp_path / "collecting") == survivors(tmp_path / "reading")


def test_what_cannot_be_shared_is_refused(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    data = text(text_file, samples=2)
    write = {"name": "wanda", "pattern": "2:4", "allocation": "owl"}
    with pytest.raises((RecipeError, Problems), match="allocation: owl needs sparsity"):
        planned(trained_llama, tmp_path / "x", write_recipe(tmp_path, data, method=write))
    sparse = write_recipe(tmp_path, data, method={"name": "wanda", "sparsity": 0.5, "store": "sparse"})
    run(trained_llama, tmp_path / "sparse", sparse)
    one = {"include": ["model.layers.0.mlp.up_proj"]}
    again = write_recipe(tmp_path, data, method={"name": "wanda", "sparsity": 0.7, "allocation": "owl"}, select=one)
    with pytest.raises((RecipeError, Problems), match="it is sparse already"):
        planned(tmp_path / "sparse", tmp_path / "x", again)


@pytest.mark.parametrize("per", ["bytes", "latency"])
def test_every_layer_gets_a_pattern_of_the_list(tmp_path: Path, trained_llama: Path, text_file: Path, per: str) -> None:
    patterns = ["16x1", "2:4"] if per == "bytes" else ["unstructured", "2:4", "16x1"]
    method = {"name": "wanda", "pattern": "search", "candidates": patterns, "per": per,
              "scope": "layer", "store": "sparse"}  # fmt: skip
    recipe = write_recipe(tmp_path, text(text_file, samples=4), method=method)
    report = run(trained_llama, tmp_path / "out", recipe)
    found = {row.detail.get("pattern") or row.detail.get("block") or "unstructured"
             for row in report.layers if row.method != "-"}  # fmt: skip
    assert found <= set(patterns)
    if per == "bytes":
        assert found == {"2:4"}  # its mask takes less than a bit mask, and blocks of 16 lose far more
    counts = survivors(tmp_path / "out")
    assert all(count <= (Checkpoint.open(trained_llama).dense(name).numel() + 1) // 2 for name, count in counts.items())


def test_a_search_keeps_to_its_bytes_at_the_least_loss(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    """Between the smallest pattern for all and the largest; to the very end of the budget, and no byte beyond it."""
    sizes, spread = {}, {}
    base = {"name": "wanda", "store": "sparse"}
    data = text(text_file, samples=4)
    for pattern in ("1:4", "2:4"):
        report = run(
            trained_llama, tmp_path / pattern[0], write_recipe(tmp_path, data, method={**base, "pattern": pattern})
        )
        sizes[pattern] = report.after.weight_bytes
    search = {**base, "scope": "layer", "pattern": "search", "candidates": ["1:4", "2:4"]}
    for share in (0.5, 1.5):
        budget = int(sizes["1:4"] + share * (sizes["2:4"] - sizes["1:4"])) + SLACK
        out = tmp_path / f"share-{share}"
        report = run(trained_llama, out, write_recipe(tmp_path, data, method={**search, "target_bytes": budget}))
        assert report.after.weight_bytes <= budget
        spread[share] = [row.detail["pattern"] for row in report.layers if row.method != "-"]
    assert set(spread[0.5]) == {"1:4", "2:4"}
    assert set(spread[1.5]) == {"2:4"}
    few = write_recipe(tmp_path, data, method={**search, "target_bytes": sizes["1:4"] // 2})
    with pytest.raises((RecipeError, Problems), match="out of reach"):
        planned(trained_llama, tmp_path / "x", few)


def test_several_sparsities_that_are_shared_are_refused(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    method = {"name": "wanda", "sparsity": 0.5, "allocation": "owl"}
    rules = [{"match": "*.down_proj", "sparsity": 0.7}]
    recipe = write_recipe(tmp_path, text(text_file, samples=2), method=method, rules=rules)
    with pytest.raises(RecipeError, match="in several ways"):
        run(trained_llama, tmp_path / "out", recipe)
