from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError, CompressError, Problems
from aicompress.methods import get
from aicompress.model.channels.cut import Kept, cut_module
from aicompress.model.loading.load import load
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.channels import run as driver
from aicompress.pipeline.channels.plan import ChannelPlan
from aicompress.pipeline.channels.planner import make_plan
from aicompress.pipeline.channels.selection import Speed
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.step.models.running_model import Setting
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import Model, Recipe, Select
from aicompress.recipe.step import Calibration
from aicompress.report.model import Report
from tests.checkpoints import Mlp, learn, make_digits, make_file
from tests.pipeline.channels.networks import NETWORKS, Stubborn, Wide, lively

IMAGES = torch.randn(96, 1, 12, 12, generator=torch.Generator().manual_seed(0))
MLP = Model(sequential=("flatten", "fc1", "relu", "fc2", "relu", "fc3"))


def factory(name: str) -> Model:
    return Model(factory=f"tests.pipeline.channels.networks:{name}")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    labels = np.random.default_rng(0).integers(0, 10, len(IMAGES))
    np.savez(path, images=IMAGES.numpy(), labels=labels)
    return Calibration(arrays=str(path), inputs="images", labels="labels")


def recipe(
    model: Model | None, calibration: Calibration | None = None, select: Select = Select(), **method: Any
) -> Recipe:
    config = get("prune", "channels").config(**method)
    return Recipe(version=1, method=config, model=model, calibration=calibration, select=select)


def planned(source: Path, out: Path, steps: Recipe) -> ChannelPlan:
    return make_plan(source, Destination(out, overwrite=True), steps, "prune", Request(allow_code=True))


def prune(source: Path, out: Path, steps: Recipe) -> tuple[ChannelPlan, Report]:
    """Prune; the plan's bytes must be those of the run."""
    found = planned(source, out, steps)
    assert found.summary().to_json()
    report = driver.run(found, Options(latency="off"))
    assert found.output.weight_bytes == report.after.weight_bytes == out.stat().st_size
    return found, report


def refused(source: Path, out: Path, steps: Recipe) -> str:
    with pytest.raises(CompressError) as found:
        planned(source, out, steps)
    assert not list(out.parent.glob(f"*{out.stem}*"))
    problems = found.value.problems if isinstance(found.value, Problems) else (found.value,)
    return " ; ".join(f"{problem.message} | {problem.hint}" for problem in problems)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_file_runs_in_the_module_it_came_from(name: str, tmp_path: Path) -> None:
    module = lively(NETWORKS[name]())
    source = make_file(tmp_path / "in.safetensors", module)
    found, report = prune(source, tmp_path / "out.safetensors", recipe(factory(name), sparsity=0.5))
    wanted = copy.deepcopy(module)
    cut_module(wanted, found.kept)
    running = load(tmp_path / "out.safetensors", model=NETWORKS[name]())
    with torch.no_grad():
        assert torch.equal(running(IMAGES), wanted(IMAGES))
    assert report.after.parameters < 0.6 * report.before.parameters
    assert report.after.parameters == sum(t.numel() for t in running.state_dict().values())
    assert running.fc.in_features < module.fc.in_features if hasattr(module, "fc") else True


def test_another_module_is_refused(tmp_path: Path) -> None:
    source = make_file(tmp_path / "in.safetensors", lively(NETWORKS["Residual"]()))
    prune(source, tmp_path / "out.safetensors", recipe(factory("Residual"), sparsity=0.5))
    with pytest.raises(CheckpointError, match="was pruned at"):
        load(tmp_path / "out.safetensors", model=NETWORKS["Flattened"]())
    raw = load_file(tmp_path / "out.safetensors")
    make_file(tmp_path / "bare.safetensors", _Raw(raw))
    with pytest.raises(CheckpointError):  # without the manifest nothing may have another shape than its definition
        load(tmp_path / "bare.safetensors", model=NETWORKS["Residual"]())


class _Raw(nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return self._tensors


def test_repair_brings_the_outputs_nearer_and_says_what_it_read(tmp_path: Path, images: Calibration) -> None:
    module = lively(NETWORKS["Residual"]())
    source = make_file(tmp_path / "in.safetensors", module)
    errors = {}
    for name, fields in {
        "cut": {"refit": False, "recalibrate_norms": False},
        "norms": {"refit": False},
        "both": {},
    }.items():
        out = tmp_path / f"{name}.safetensors"
        _, report = prune(source, out, recipe(factory("Residual"), images, sparsity=0.5, score="taylor", **fields))
        with torch.no_grad():
            errors[name] = float((load(out, model=NETWORKS["Residual"]())(IMAGES) - module(IMAGES)).norm())
        assert report.calibration["data"][0]["samples"] == 96
    assert errors["both"] < errors["norms"]
    assert errors["both"] < 0.5 * errors["cut"]
    assert json.loads(report.to_json())["calibration"]


def test_later_steps_read_a_pruned_file(tmp_path: Path, images: Calibration) -> None:
    source = make_file(tmp_path / "in.safetensors", lively(NETWORKS["Depthwise"]()))
    pruned, again, quantized = (tmp_path / f"{name}.safetensors" for name in ("pruned", "again", "quantized"))
    prune(source, pruned, recipe(factory("Depthwise"), sparsity=0.3))
    prune(pruned, again, recipe(factory("Depthwise"), images, sparsity=0.4, score="activation"))
    sizes = [Checkpoint.open(path).parameters()["fc.weight"].shape[1] for path in (source, pruned, again)]
    assert sizes == [9, 7, 5]
    config = get("quantize", "gptq").config(bits=8, granularity="channel")
    few = images.model_copy(update={"samples": 96})
    steps = Recipe(version=1, method=config, model=factory("Depthwise"), calibration=few)
    job = planner.make_plan(again, Destination(quantized), steps, "quantize", Request(allow_code=True))
    layerwise.run(job, Options(latency="off"))
    assert len(Checkpoint.open(quantized).manifest.lineage) == 3
    setting = Setting(factory("Depthwise"), allow_code=True)
    with torch.no_grad():
        small, coded = (setting.start(str(path)).module(IMAGES) for path in (again, quantized))
    assert float((small - coded).norm() / small.norm()) < 0.05


def test_a_chain_needs_no_factory(tmp_path: Path) -> None:
    data = make_digits(tmp_path / "digits.npz", 300, 10)
    module = learn(Mlp(), count=300, epochs=3)
    source = make_file(tmp_path / "in.safetensors", module, torch.bfloat16)
    given = Calibration(arrays=str(data), inputs="train_images", labels="train_labels", scale=255)
    out = tmp_path / "out.safetensors"
    found, report = prune(source, out, recipe(MLP, given, target_parameters=60_000, scope="global", score="taylor"))
    assert 58_000 < report.after.parameters <= 60_000
    assert all(spec.dtype is torch.bfloat16 for spec in Checkpoint.open(out).parameters().values())
    tensors = load_file(out)
    assert tensors["fc1.weight"].shape[1] == 784
    assert tensors["fc3.weight"].shape[0] == 10
    assert tensors["fc1.weight"].shape[0] == tensors["fc2.weight"].shape[1] == len(found.groups[0][1])
    with torch.no_grad():
        shown = torch.rand(4, 28, 28).bfloat16()
        before, after = (Setting(MLP).start(str(path)).module(shown) for path in (source, out))
    assert before.shape == after.shape
    row = next(row for row in report.layers if row.name == "fc2")
    assert row.detail["in"] == f"{tensors['fc2.weight'].shape[1]} of 300"


def test_target_bytes_is_met(tmp_path: Path) -> None:
    source = make_file(tmp_path / "in.safetensors", lively(NETWORKS["Grouped"]()))
    _, report = prune(source, tmp_path / "out.safetensors", recipe(factory("Grouped"), target_bytes="16KB"))
    assert 14_000 < report.after.weight_bytes <= 16_000


def test_target_latency_is_met_by_more_channels_the_more_time_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that counts parameters: a busy machine's tells nothing of a network this small."""
    source = make_file(tmp_path / "in.safetensors", lively(Wide()))

    def timed(speed: Speed, kept: Mapping[str, Kept]) -> float:
        few = copy.deepcopy(speed.module)
        cut_module(few, kept)
        sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (few, speed.module)]
        return sizes[0] / sizes[1]

    monkeypatch.setattr(Speed, "ratio", timed)
    sizes = []
    for share in (0.4, 0.8):
        given = recipe(factory("Wide"), target_latency=share, multiple=64, input_shape=(1, 8, 8))
        found, report = prune(source, tmp_path / f"{share}.safetensors", given)
        sizes.append(report.after.parameters)
        assert timed(Speed(found.choice.draft.module, None), found.kept) <= share
    assert sizes[0] < sizes[1] < report.before.parameters


def test_widths_are_timed_once(tmp_path: Path) -> None:
    source = make_file(tmp_path / "in.safetensors", lively(Wide()))
    given = recipe(factory("Wide"), keep=0.5, multiple=64, input_shape=(1, 8, 8))
    found, _ = prune(source, tmp_path / "out.safetensors", given)
    speed = Speed(found.choice.draft.module, torch.randn(2, 1, 8, 8))
    assert speed.ratio(found.kept) == speed.ratio(found.kept) > 0  # out of its table


def test_what_is_not_cut_keeps_its_bits(tmp_path: Path) -> None:
    module = lively(NETWORKS["Residual"]()).double()
    source = make_file(tmp_path / "in.safetensors", module, torch.float64)
    only = Select(include=("conv1",))
    found, _ = prune(source, tmp_path / "out.safetensors", recipe(factory("Residual"), select=only, keep=0.5))
    assert set(found.kept) == {"conv1", "norm1", "conv2"}
    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    units = found.groups[0][1]
    assert torch.equal(after["conv1.weight"], before["conv1.weight"][units])
    assert torch.equal(after["conv2.weight"], before["conv2.weight"][:, units])
    same = [name for name in before if not name.startswith(("conv1", "norm1", "conv2"))]
    assert all(torch.equal(before[name], after[name]) for name in same)


def test_a_compressed_input_is_cut_in_its_form_or_decoded(tmp_path: Path) -> None:
    module = lively(Mlp())
    source = make_file(tmp_path / "in.safetensors", module)
    coded = tmp_path / "coded.safetensors"
    config = get("quantize", "rtn").config(bits=8, granularity="channel")
    steps = Recipe(version=1, method=config, select=Select(include=("fc1", "fc2"), kinds=("linear", "head")))
    layerwise.run(planner.make_plan(source, Destination(coded), steps, "quantize"), Options(latency="off"))
    found, _ = prune(coded, tmp_path / "out.safetensors", recipe(MLP, keep=0.5))
    assert {"fc1.weight", "fc2.weight"} <= Checkpoint.open(tmp_path / "out.safetensors").manifest.entries.keys()
    dense = load(tmp_path / "out.safetensors")
    assert torch.equal(dense["fc1.weight"], load(coded)["fc1.weight"][found.groups[0][1]])


def test_nothing_to_remove_is_said(tmp_path: Path) -> None:
    source = make_file(tmp_path / "in.safetensors", lively(NETWORKS["Flattened"]()))
    _, report = prune(source, tmp_path / "out.safetensors", recipe(factory("Flattened"), sparsity=0.01))
    assert "nothing is removed" in report.warnings[0]
    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_layers_that_keep_their_channels_are_named(tmp_path: Path) -> None:
    source = make_file(tmp_path / "in.safetensors", lively(Stubborn()))
    _, report = prune(source, tmp_path / "out.safetensors", recipe(factory("Stubborn"), sparsity=0.5))
    assert "soft: removing its channels changes more than themselves" in report.warnings[0]
    rows = {row.name: row for row in report.layers}
    assert rows["fc"].detail == {"in": "4 of 8"}
    assert rows["soft"].note == "removing its channels changes more than themselves"


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, images: Calibration) -> None:
    source = make_file(tmp_path / "in.safetensors", lively(NETWORKS["Grouped"]()))
    outs = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for out in outs:
        prune(source, out, recipe(factory("Grouped"), images, keep=0.5, score="taylor", scope="global"))
    assert outs[0].read_bytes() == outs[1].read_bytes()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (lambda d: recipe(None, keep=0.5), "names no architecture, and channels are traced by running it"),
        (
            lambda d: recipe(factory("Residual"), keep=0.5, score="taylor"),
            "method.score: taylor needs calibration data",
        ),
        (lambda d: recipe(factory("Residual"), keep=0.5, refit=True), "method.refit: True needs calibration data"),
        (lambda d: recipe(factory("Residual"), keep=0.5, input_shape=(3, 8, 8)), "does not take inputs (3, 8, 8)"),
        (lambda d: recipe(factory("Residual"), target_bytes=100), "below what the network weighs"),
        (lambda d: recipe(factory("Residual"), keep=0.5, select=Select(include=("stem",))), "no group of channels"),
        (lambda d: recipe(factory("Residual"), Calibration(text=d.arrays), keep=0.5), "channels reads arrays"),
    ],
)
def test_refusals(steps: Any, expected: str, tmp_path: Path, images: Calibration) -> None:
    source = make_file(tmp_path / "in.safetensors", lively(NETWORKS["Residual"]()))
    assert expected in refused(source, tmp_path / "out.safetensors", steps(images))


def test_a_directory_with_config_json_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    assert "cannot express other channels" in refused(tiny_bert, tmp_path / "out", recipe(None, keep=0.5))
