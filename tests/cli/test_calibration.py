"""Calibrated steps from the command line: plain modules, files of statistics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aicompress.checkpoint.statistics import StatisticsFile
from tests.checkpoints import Mlp

Call = Callable[..., tuple[int, str, str]]
CHAIN = {"sequential": ["flatten", "fc1", "relu", "fc2", "relu", "fc3"]}
FACTORY = {"factory": f"{__name__}:build"}


def build() -> Mlp:
    return Mlp()


def build_another() -> Mlp:
    found = Mlp()
    del found.fc3
    return found


def recipe(folder: Path, digits: Path, **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    data = {"arrays": str(digits), "inputs": "train_images", "scale": 255, "samples": 200}
    method = {"name": "gptq", "bits": 4, "granularity": "channel"}
    path.write_text(json.dumps({"version": 1, "method": method, "calibration": data, **sections}))
    return path


@pytest.mark.parametrize(("model", "flags"), [(CHAIN, []), (FACTORY, ["--allow-code"])], ids=["chain", "factory"])
def test_a_bare_file_is_calibrated_on_arrays(
    tmp_path: Path, mlp_file: Path, digits_npz: Path, call: Call, model: Any, flags: list[str]
) -> None:
    out = tmp_path / "out.safetensors"
    path = recipe(tmp_path, digits_npz, model=model)
    code, printed, error = call("quantize", mlp_file, out, "-r", path, "--json", "--latency", "off", *flags)
    assert code == 0, error
    report = json.loads(printed)
    rows = {row["name"]: row for row in report["layers"]}
    assert {name: row["method"] for name, row in rows.items()} == {"fc1": "gptq", "fc2": "gptq", "fc3": "gptq"}
    assert not any("data-free" in row["note"] for row in rows.values())
    assert report["calibration"]["data"][0]["samples"] == 200
    # Rounding that knows the inputs is better on them than rounding that does not.
    wanted = {"version": 1, "model": CHAIN, "quality": {"accuracy": {
        "arrays": str(digits_npz), "inputs": "test_images", "labels": "test_labels", "scale": 255}}}  # fmt: skip
    (tmp_path / "eval.yaml").write_text(json.dumps(wanted))
    code, printed, error = call("eval", out, "--against", mlp_file, "-r", tmp_path / "eval.yaml", "--json")
    assert code == 0, error
    accuracy = json.loads(printed)["quality"]["accuracy"]
    assert accuracy["value"] > accuracy["baseline"] - 0.03


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "names no architecture"),
        (FACTORY, "the recipe wants to run"),
        ({"sequential": ["fc1", "relu", "fc9"]}, "'fc9' is neither a layer"),
        ({"sequential": ["flatten", "fc1"]}, "has unexpected parameters: fc2.bias"),
    ],
)
def test_what_cannot_run_is_refused_before_work(
    tmp_path: Path, mlp_file: Path, digits_npz: Path, call: Call, model: Any, message: str
) -> None:
    out = tmp_path / "out.safetensors"
    path = recipe(tmp_path, digits_npz, **({"model": model} if model else {}))
    code, printed, error = call("quantize", mlp_file, out, "-r", path)
    assert (code, printed) == (2, "")
    assert message in error
    assert [left.name for left in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_factory_that_builds_another_model_is_refused(
    tmp_path: Path, mlp_file: Path, digits_npz: Path, call: Call
) -> None:
    path = recipe(tmp_path, digits_npz, model={"factory": f"{__name__}:build_another"})
    code, _, error = call("quantize", mlp_file, tmp_path / "out.safetensors", "-r", path, "--allow-code", "--dry-run")
    assert code == 2
    assert "unexpected parameters: fc3" in error


def test_missing_data_is_refused_before_work(tmp_path: Path, mlp_file: Path, call: Call) -> None:
    path = recipe(tmp_path, tmp_path / "absent.npz", model=CHAIN)
    code, _, error = call("quantize", mlp_file, tmp_path / "out.safetensors", "-r", path)
    assert code == 2
    assert "absent.npz does not exist" in error


def test_statistics_are_kept_shown_and_read(tmp_path: Path, mlp_file: Path, digits_npz: Path, call: Call) -> None:
    stats = tmp_path / "stats.safetensors"
    common = ("-r", recipe(tmp_path, digits_npz, model=CHAIN), "--stats", stats, "--latency", "off", "-q")
    assert call("quantize", mlp_file, tmp_path / "one.safetensors", *common)[0] == 0
    assert StatisticsFile.open(stats).rows == {"fc1.weight": 200, "fc2.weight": 200, "fc3.weight": 200}
    code, printed, _ = call("inspect", stats)
    assert code == 0
    assert "fc2.weight" in printed
    assert "200" in printed
    shown = json.loads(call("inspect", stats, "--json")[1])
    assert [row["rows"] for row in shown["layers"]] == [200, 200, 200]
    assert shown["calibration"]["data"][0]["samples"] == 200
    prune = tmp_path / "prune.yaml"
    prune.write_text(json.dumps({"version": 1, "method": {"name": "wanda", "sparsity": 0.5}}))
    code, _, error = call("prune", mlp_file, tmp_path / "two.safetensors", "-r", prune, "--stats", stats, "-q")
    assert code == 0, error


def test_a_method_without_needs_takes_no_statistics(tmp_path: Path, mlp_file: Path, call: Call) -> None:
    stats = tmp_path / "stats.safetensors"
    code, _, error = call("quantize", mlp_file, tmp_path / "o.safetensors", "-r", "quantize/rtn-w8", "--stats", stats)
    assert code == 2
    assert "rtn reads no statistics of inputs" in error


def test_a_source_of_fewer_samples_than_are_asked_for_is_taken_whole(
    tmp_path: Path, mlp_file: Path, call: Call
) -> None:
    np.savez(tmp_path / "few.npz", x=np.random.default_rng(0).random((20, 28, 28), dtype=np.float32))
    path = recipe(tmp_path, tmp_path, model=CHAIN, calibration={"arrays": "few.npz", "inputs": "x"})
    code, out, err = call("quantize", mlp_file, tmp_path / "out.safetensors", "-r", path, "--json")
    assert code == 0, err
    (used,) = json.loads(out)["calibration"]["data"]
    assert (used["samples"], used["available"], used["asked"]) == (20, 20, None)
    assert not [line for line in json.loads(out)["warnings"] if "few.npz" in line]
    args = ("quantize", mlp_file, tmp_path / "all.safetensors", "-r", path, "--json")
    code, out, err = call(*args, "--set", "calibration.samples=21")
    assert code == 0, err
    (used,) = json.loads(out)["calibration"]["data"]
    assert (used["samples"], used["asked"]) == (20, 21)
    assert "few.npz: it holds fewer samples than are asked for: 20 of 21" in json.loads(out)["warnings"]


@pytest.mark.parametrize("method", ["gptq", "taylor"])
def test_arrays_that_the_model_does_not_take_are_refused(
    tmp_path: Path, mlp_file: Path, call: Call, method: str
) -> None:
    np.savez(tmp_path / "wide.npz", x=np.ones((4, 28, 30), dtype=np.float32))
    data = {"arrays": "wide.npz", "inputs": "x"}
    settings = (
        {"name": "gptq", "bits": 4, "granularity": "channel"} if method == "gptq" else {"name": method, "sparsity": 0.5}
    )
    path = recipe(tmp_path, tmp_path, model=CHAIN, calibration=data, method=settings)
    command = "quantize" if method == "gptq" else "prune"
    code, _, err = call(command, mlp_file, tmp_path / "out.safetensors", "-r", path)
    assert code == 2, err
    assert "error: the model does not run on real numbers (4, 28, 30) of wide.npz" in err
    assert not (tmp_path / "out.safetensors").exists()
