"""Levels: groups of layers, by depth or by pattern, whose budgets are their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from aicompress.errors import Refused
from aicompress.pipeline import steps
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load
from aicompress.report.markdown import to_markdown
from aicompress.report.model import Report
from tests.pipeline.calibration.steps import text

OFF = Options(latency="off")


def planned(source: Path, out: Path, command: str, method: dict[str, Any], levels: Any, **sections: Any) -> Plan:
    path = out.parent / f"{out.name}.yaml"
    whole = {"version": 1, "method": method, "levels": levels, "report": {"html": False}, **sections}
    path.write_text(json.dumps(whole))
    plan = steps.make_plan(source, Destination(out), load(str(path), command), command)
    assert isinstance(plan, Plan)
    return plan


def sizes(plan: Plan) -> dict[str, int]:
    """Bytes of the layers that each level has, by what the plan calls it."""
    total: dict[str, int] = {}
    for row in plan.summary().rows:
        assert row.bytes_after is not None
        total[row.rule] = total.get(row.rule, 0) + row.bytes_after
    return total


def test_bytes_of_a_level_are_of_its_layers_and_the_recipes_of_the_whole_output(
    tiny_llama: Path, tmp_path: Path
) -> None:
    levels = [{"layers": "0", "target_bytes": 40_000}, {"match": "*.2.mlp.*", "target_bytes": 25_000}]
    plan = planned(tiny_llama, tmp_path / "out", "factorize", {"name": "svd", "target_bytes": "300KB"}, levels)
    taken = sizes(plan)
    assert 35_000 < taken["levels[0]: 0"] <= 40_000
    assert 20_000 < taken["levels[1]: *.2.mlp.*"] <= 25_000
    assert taken["method"]
    assert 265_000 < plan.output.weight_bytes <= 300_000
    report = steps.run(plan, OFF)
    assert report.after.weight_bytes == plan.output.weight_bytes


def test_a_level_without_a_budget_shares_the_recipes(tiny_llama: Path, tmp_path: Path) -> None:
    method = {"name": "svd", "target_bytes": "300KB"}
    plain = planned(tiny_llama, tmp_path / "plain", "factorize", method, [])
    plan = planned(tiny_llama, tmp_path / "out", "factorize", method, [{"layers": "0", "multiple": 1}])
    assert [row.detail for row in plan.summary().rows] == [row.detail for row in plain.summary().rows]


def test_ranks_of_a_level_that_calibration_decides(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    levels = [{"layers": "-1", "target_bytes": 40_000}, {"layers": "0-1", "target_bytes": 60_000}]
    method = {"name": "whitened", "target_bytes": "300KB"}
    plan = planned(tiny_llama, tmp_path / "out", "factorize", method, levels, calibration=text(text_file, 2))
    report = steps.run(plan, OFF)
    taken = dict.fromkeys(("levels[0]: 2", "levels[1]: 0-1"), 0)
    for row in report.layers:
        if row.method != "-":
            taken[row.rule] += row.bytes_after
    assert 35_000 < taken["levels[0]: 2"] <= 40_000
    assert 54_000 < taken["levels[1]: 0-1"] <= 60_000


@pytest.mark.parametrize(
    "method",
    [
        {"name": "magnitude", "sparsity": 0.5, "scope": "global"},
        {"name": "wanda", "sparsity": 0.5, "allocation": "global", "scope": "layer"},
    ],
    ids=["weights", "calibrated"],
)
def test_layers_of_a_level_share_its_sparsity(
    tiny_llama: Path, text_file: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    levels = [{"layers": "0", "sparsity": 0.2}, {"layers": "2", "sparsity": 0.7}]
    data = {"calibration": text(text_file, 2)} if method["name"] == "wanda" else {}
    report = steps.run(planned(tiny_llama, tmp_path / "out", "prune", method, levels, **data), OFF)
    for rule, wanted in (("levels[0]: 0", 0.2), ("levels[1]: 2", 0.7), ("method", 0.5)):
        rows = [row for row in report.layers if row.rule == rule]
        zeros = sum(row.detail["sparsity"] * row.bytes_before for row in rows)
        assert zeros / sum(row.bytes_before for row in rows) == pytest.approx(wanted, abs=0.001)
        assert len({row.detail["sparsity"] for row in rows}) > 1


AUTO = {"name": "rtn", "bits": "auto", "group_size": 32, "group_sizes": [32], "samples": 2, "evaluations": 4}


def spent(report: Report, rule: str) -> float:
    """Bits per weight of a level's layers."""
    rows = [row for row in report.layers if row.rule == rule]
    return 32 * sum(row.bytes_after for row in rows) / sum(row.bytes_before for row in rows)


def test_widths_of_a_level_are_searched_within_its_bits(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    levels = [{"layers": "0", "target_bytes": 30_000}, {"match": "*.1.mlp.*", "target_bpw": 3.6}]
    method = {**AUTO, "target_bytes": "170KB"}
    plan = planned(tiny_llama, tmp_path / "out", "quantize", method, levels, calibration=text(text_file, 2))
    undecided = plan.summary().undecided
    assert undecided is not None
    assert (undecided.target, undecided.value, undecided.layers) == ("target_bytes", 170_000, 21)
    assert undecided.levels[1] == "levels[1]: *.1.mlp.*: target_bpw 3.6"
    report = steps.run(plan, OFF)
    assert 26_000 < sum(row.bytes_after for row in report.layers if row.rule == "levels[0]: 0") <= 30_000
    assert 3 < spent(report, "levels[1]: *.1.mlp.*") <= 3.6
    assert report.after.weight_bytes <= 170_000
    assert sum(len(unit["layers"]) for unit in report.bits["units"]) == 21
    assert [level["level"] for level in report.bits["levels"]] == ["levels[0]: 0", "levels[1]: *.1.mlp.*"]
    assert "Chosen for target_bpw 3.6 in levels" in to_markdown(report)


@pytest.mark.parametrize(
    ("method", "level", "part"),
    [
        ({"target_bpw": 4}, {"target_bpw": 1}, "levels[0]: 0: target_bpw 1 is out of reach"),
        ({"max_kl": 0.1}, {"target_bpw": 4}, "max_kl bounds what the whole model loses"),
        ({"target_bpw": 4}, {"max_kl": 0.1}, "bits: auto is given with target_bpw"),
    ],
)
def test_budgets_of_bits_that_cannot_be_are_refused(
    tiny_llama: Path, text_file: Path, tmp_path: Path, method: dict[str, Any], level: dict[str, Any], part: str
) -> None:
    levels = [{"layers": "0", **level}]
    with pytest.raises(Refused) as refused:
        planned(tiny_llama, tmp_path / "out", "quantize", {**AUTO, **method}, levels, calibration=text(text_file, 2))
    assert part in refused.value.message


@pytest.mark.parametrize(
    ("levels", "part"),
    [
        ([{"layers": "0", "target_bytes": 10}], "levels[0]: 0: target_bytes 10 is out of reach"),
        ([{"match": "*.fc9", "rank": 4}], "levels pattern '*.fc9' matches no layer"),
        ([{"layers": "0", "match": "*", "rank": 4}], "exactly one of layers and match"),
        ([{"rank": 4}], "exactly one of layers and match"),
    ],
)
def test_a_level_that_cannot_be_is_refused(tiny_llama: Path, tmp_path: Path, levels: Any, part: str) -> None:
    with pytest.raises(Refused) as refused:
        planned(tiny_llama, tmp_path / "out", "factorize", {"name": "svd", "keep": 0.5}, levels)
    assert part in refused.value.message


FOUND = {"auto": 2, "values": [{"bits": 8}, {"bits": 3}]}


def uneven(source: Path, folder: Path) -> Path:
    """The model with the feed-forward outputs of its last block nearly gone, so that it matters little."""
    out = Path(shutil.copytree(source, folder / "uneven"))
    tensors = load_file(out / "model.safetensors")
    for name in tensors:
        if name.startswith("model.layers.2.") and name.endswith(("down_proj.weight", "o_proj.weight")):
            tensors[name] = tensors[name] * 1e-3
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_the_block_that_matters_least_gets_the_last_values(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    source = uneven(tiny_llama, tmp_path)
    method = {"name": "rtn", "bits": 4, "group_size": 32}
    plan = planned(source, tmp_path / "out", "quantize", method, FOUND, calibration=text(text_file, 4))
    rules = {row.rule: row.detail["bits"] for row in plan.summary().rows}
    assert rules == {"levels[0]: 0-1": 8, "levels[1]: 2": 3}
    report = steps.run(plan, OFF)
    meaning, first, second = report.notes[-3:]
    assert "KL divergence of the model's outputs" in meaning
    assert first.startswith("levels[0]: blocks 0-1, bits 8; sensitivity ")
    sensitive = [float(each) for each in first.rpartition("sensitivity ")[2].split(", ")]
    assert len(sensitive) == 2
    assert min(sensitive) > 100 * float(second.rpartition("sensitivity ")[2])
    assert plan.summary().notes[-3:] == report.notes[-3:]
    assert report.calibration["data"][0]["samples"] == 4
    assert report.recipe["levels"] == [
        {"layers": "0-1", "skip": False, "bits": 8},
        {"layers": "2", "skip": False, "bits": 3},
    ]


def test_without_calibration_data_the_weights_decide(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "in"))
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.startswith("model.layers.0.") and name.endswith("proj.weight"):
            tensors[name] = tensors[name].sign() * 0.01  # what 3 bits hold exactly
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    plan = planned(source, tmp_path / "out", "quantize", {"name": "rtn", "bits": 4, "group_size": 32}, FOUND)
    assert {row.rule: row.detail["bits"] for row in plan.summary().rows} == {"levels[0]: 1-2": 8, "levels[1]: 0": 3}
    assert "relative squared error of its weights" in plan.summary().notes[-3]


@pytest.mark.parametrize(
    ("command", "method", "values"),
    [
        ("quantize", {"name": "gptq", "bits": 4, "group_size": 32, "refine": 0}, [{"bits": 8}, {"skip": True}]),
        ("quantize", {"name": "rtn", "bits": "auto", "target_bpw": 5}, [{"choices": [8, 4]}, {"bits": 3}]),
        ("prune", {"name": "taylor", "sparsity": 0.5}, [{"sparsity": 0.2}, {"sparsity": 0.7}]),
        ("factorize", {"name": "whitened", "energy": 0.9}, [{"target_bytes": "90KB"}, {"target_bytes": "20KB"}]),
    ],
    ids=["calibrated", "widths", "gradients", "ranks"],
)
def test_levels_are_found_for_every_kind_of_method(
    tiny_llama: Path, text_file: Path, tmp_path: Path, command: str, method: dict[str, Any], values: Any
) -> None:
    source, levels = uneven(tiny_llama, tmp_path), {"auto": 2, "values": values}
    plan = planned(source, tmp_path / "out", command, method, levels, calibration=text(text_file, 2))
    assert [level.layers for level in plan.recipe.given_levels] == ["0-1", "2"]


@pytest.mark.parametrize(
    ("levels", "part"),
    [
        ({"auto": 4, "values": [{}, {}, {}, {}]}, "levels: 4 levels cannot be made of 3 blocks"),
        ({"auto": 2, "values": [{"bits": 8}]}, "auto: 2 needs 2 values"),
        ({"auto": 1, "values": [{"bitz": 8}]}, "levels.values.0: levels[0]: 0-2.bitz: unknown key"),
        ({"auto": 1}, "levels.values: missing"),
    ],
)
def test_levels_that_cannot_be_found_are_refused(tiny_llama: Path, tmp_path: Path, levels: Any, part: str) -> None:
    with pytest.raises(Refused) as refused:
        planned(tiny_llama, tmp_path / "out", "quantize", {"name": "rtn", "bits": 4, "group_size": 32}, levels)
    assert part in refused.value.message
