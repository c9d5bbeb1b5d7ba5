"""Every layer-wise method reads what every other one wrote, on a bare file and on a transformers directory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from aicompress.checkpoint import Checkpoint
from aicompress.errors import Problems
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.registry import methods
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load
from tests import checkpoints

COMMAND = {
    name: command
    for command in ("factorize", "quantize", "prune")
    for name, method in methods(command).items()
    if isinstance(method, LayerMethod) and not method.needs and method.made_for == "layers"
    if method.shares is None or method.shares.alone  # else it does nothing where no layers share
}
# Ranks so low that the factors are smaller than 8-bit codes: then every order of these three shrinks or keeps the file.
PARAMETERS: dict[str, dict[str, Any]] = {
    "svd": {"keep": 0.1},
    "rtn": {"bits": 8, "granularity": "channel"},
    "magnitude": {"sparsity": 0.5},
    "hqq": {"granularity": "channel"},
    "nf4": {"granularity": "channel"},
    "sinq": {"granularity": "channel"},
}
PAIRS = list(itertools.product(COMMAND, repeat=2))
# What one step leaves and another cannot take, and how it says so.
REFUSED = {
    ("svd", "svd"): "is a part of a factorized layer",
    **{("hqq", zeroing): "its zero points are real numbers" for zeroing in ("magnitude", "lamp")},
    **{(s, zeroing): "cannot hold a mask" for s in ("kmeans", "nf4", "sinq") for zeroing in ("magnitude", "lamp")},
}


def parameters(name: str) -> dict[str, Any]:
    """Parameters of a method: the first example that it gives of itself."""
    if name in PARAMETERS:
        return PARAMETERS[name]
    extra: Any = methods(COMMAND[name])[name].config.model_config["json_schema_extra"]
    return dict(extra["examples"][0])


def step(source: Path, out: Path, name: str) -> layerwise.Report:
    """One step, whose dry run must tell the truth."""
    recipe = out.parent / f"{name}.yaml"
    sections = {"method": {"name": name, **parameters(name)}, "report": {"html": False}}
    recipe.write_text(yaml.safe_dump({"version": 1, **sections}))
    planned = planner.make_plan(source, Destination(out), load(str(recipe), COMMAND[name]), COMMAND[name])
    report = layerwise.run(planned, Options(latency="off"))
    check(planned.summary(), out, source)
    return report


def check(summary: Any, out: Path, source: Path) -> None:
    """Bytes are as planned, every parameter of the input is there, decodes and is finite."""
    files = {out.name: out} if out.is_file() else {path.name: path for path in out.glob("*.safetensors")}
    assert summary.weight_files == {name: path.stat().st_size for name, path in files.items()}
    if out.is_dir():
        others = [p for p in out.rglob("*") if p.is_file() and p.name not in files and not p.name.startswith("report.")]
        assert summary.other_bytes == sum(path.stat().st_size for path in others)
    written, before = Checkpoint.open(out), Checkpoint.open(source)
    assert written.parameters() == before.parameters()
    for name in written.parameters():
        assert torch.isfinite(written.dense(name).float()).all()


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fc1, fc2, fc3 (96-48-32-10), random."""
    torch.manual_seed(0)
    sizes = (96, 48, 32, 10)
    layers = {f"fc{number}": nn.Linear(*sizes[number - 1 : number + 1]) for number in (1, 2, 3)}
    return checkpoints.make_file(tmp_path_factory.mktemp("small") / "in.safetensors", nn.ModuleDict(layers))


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of the tiny Llama, tied."""
    return checkpoints.make_llama(tmp_path_factory.mktemp("small") / "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def first_steps(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """What a method writes for a source, checked when it is first asked for: every second step reads the same."""

    @cache
    def written(source: Path, name: str) -> Path:
        out = tmp_path_factory.mktemp("first") / f"one{source.suffix}"
        step(source, out, name)
        return out

    return written


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda name: name)
@pytest.mark.parametrize("model", ["small_file", "small_llama"])
def test_every_ordered_pair(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    first_steps: Callable[[Path, str], Path],
    model: str,
    first: str,
    second: str,
) -> None:
    one = first_steps(request.getfixturevalue(model), first)
    two = tmp_path / f"two{one.suffix}"
    if (first, second) in REFUSED:
        with pytest.raises(Problems) as caught:
            step(one, two, second)
        assert all(REFUSED[first, second] in problem.message for problem in caught.value.problems)
        assert not two.exists()
        return
    report = step(one, two, second)
    assert [s["recipe"]["method"]["name"] for s in report.lineage] == [first, second]
    assert Checkpoint.open(two).manifest.lineage == report.lineage


@pytest.mark.parametrize("model", ["cnn_file", "lstm_file", "tiny_gpt2", "tiny_bert", "tiny_llama_bf16"])
@pytest.mark.parametrize("order", [("svd", "rtn", "magnitude"), ("magnitude", "svd", "rtn"), ("rtn", "magnitude")])
def test_chains_on_other_architectures(
    tmp_path: Path, request: pytest.FixtureRequest, model: str, order: tuple[str, ...]
) -> None:
    source: Path = request.getfixturevalue(model)
    suffix = ".safetensors" if source.is_file() else ""
    for number, name in enumerate(order):
        out = tmp_path / f"{number}{suffix}"
        step(source, out, name)
        source = out


def test_factors_are_quantized_each(tmp_path: Path, mlp_file: Path) -> None:
    step(mlp_file, tmp_path / "one.safetensors", "svd")
    report = step(tmp_path / "one.safetensors", tmp_path / "two.safetensors", "rtn")
    metas = {n: e.meta for n, e in Checkpoint.open(tmp_path / "two.safetensors").manifest.entries.items()}
    assert {metas["fc1.weight"]["out"]["form"], metas["fc1.weight"]["in"]["form"]} == {"int_grouped"}
    assert {row.name for row in report.layers} >= {"fc1.low_rank.out", "fc1.low_rank.in"}
    assert report.after.weight_bytes < 0.1 * Checkpoint.open(mlp_file).source.files[0].stat().st_size


def test_pruned_weights_stay_zero_when_quantized(tmp_path: Path, mlp_file: Path) -> None:
    step(mlp_file, tmp_path / "one.safetensors", "magnitude")
    step(tmp_path / "one.safetensors", tmp_path / "two.safetensors", "rtn")
    pruned = Checkpoint.open(tmp_path / "one.safetensors").dense("fc1.weight")
    assert (pruned == 0).float().mean() == pytest.approx(0.5, abs=1e-3)
    assert (Checkpoint.open(tmp_path / "two.safetensors").dense("fc1.weight")[pruned == 0] == 0).all()


def test_a_checkpoint_of_another_tool_is_quantized_again(tmp_path: Path, tiny_llama: Path) -> None:
    """Targets are class names there; the second quantization starts from the decoded weights."""
    step(tiny_llama, tmp_path / "one", "rtn")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear"]
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    (tmp_path / "one" / "aicompress.json").unlink()
    report = step(tmp_path / "one", tmp_path / "two", "rtn")
    assert len(report.lineage) == 1
    assert max(row.rel_error for row in report.layers if row.rel_error is not None) < 1e-2
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(
        Checkpoint.open(tmp_path / "two").dense(name), Checkpoint.open(tiny_llama).dense(name), atol=0.02
    )
