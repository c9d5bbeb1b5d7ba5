"""Convolutions of whole models factorized: how they run, what reads them, and what later steps make of them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import Problems, RecipeError, Refused
from aicompress.model.hf.layers_aicompress import StoredConv
from aicompress.model.loading.definitions.chain import module_for
from aicompress.model.loading.load import load as load_model
from aicompress.pipeline import steps
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.verify import verify
from aicompress.recipe import load
from aicompress.recipe.step import Model
from aicompress.report.model import Report
from tests.checkpoints import make_file
from tests.inputs import once

SHAPE = {"embedding_size": 8, "depths": [1, 1], "hidden_sizes": [8, 12], "num_labels": 5, "layer_type": "basic"}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
METHODS = ("spatial", "tucker")
HIDDEN = "import sys; sys.modules['aicompress'] = None; import torch, transformers\n"  # the package cannot be imported
READ = """
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
read = transformers.AutoModelForImageClassification.from_pretrained
for path in sys.argv[1:]:  # before any of their code has run
    try:
        read(path)
    except RuntimeError as error:
        print("mismatch" in str(error))
for path in sys.argv[1:]:
    with torch.no_grad():
        torch.save(read(path, trust_remote_code=True).eval()(images).logits, path + ".pt")
"""


@pytest.fixture(scope="session")
def tiny_resnet(built: Path) -> Path:
    """A ResNet with seven convolutions, one of them 1×1 with stride 2."""

    def make(path: Path) -> Path:
        torch.manual_seed(0)
        hf.ResNetForImageClassification(hf.ResNetConfig(**SHAPE)).save_pretrained(path)
        return path

    return once(built / "resnet", make)


def planned(source: Path, out: Path, command: str, method: dict[str, Any], **more: Any) -> Any:
    recipe = out.with_suffix(".yaml")
    recipe.write_text(json.dumps({"version": 1, "method": method, "report": {"html": False}, **more}))
    return steps.make_plan(source, Destination(out), load(str(recipe), command), command)


def run(source: Path, out: Path, command: str, method: dict[str, Any], **more: Any) -> Report:
    return steps.run(planned(source, out, command, method, **more), Options(latency="off"))


@pytest.fixture(scope="module")
def factorized(tiny_resnet: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("factorized")
    for name in METHODS:
        run(tiny_resnet, folder / name, "factorize", {"name": name, "keep": 0.5})
    return {name: folder / name for name in METHODS}


def logits(path: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = load_model(path)(IMAGES).logits
    return found


@pytest.mark.parametrize("name", METHODS)
def test_runs_as_small_convolutions_and_gives_what_the_decoded_model_gives(
    name: str, factorized: dict[str, Path], tiny_resnet: Path
) -> None:
    folder = factorized[name]
    model = load_model(folder)
    with torch.no_grad():
        found = model(IMAGES).logits
    running = [module for module in model.modules() if isinstance(module, StoredConv)]
    assert len(running) == 5
    number = 2 if name == "spatial" else 3
    assert all(len(module.__dict__["decoded"][1]) == number for module in running)
    told = [kernel for kernel in model.aicompress_kernels.values() if "convolutions" in kernel]
    assert told == 5 * [f"reference: {number} convolutions, one after the other"]
    whole, checkpoint = hf.ResNetForImageClassification.from_pretrained(tiny_resnet).eval(), Checkpoint.open(folder)
    whole.load_state_dict({name: checkpoint.dense(name) for name in checkpoint.parameters()})
    with torch.no_grad():
        torch.testing.assert_close(found, whole(IMAGES).logits, rtol=1e-4, atol=1e-5)
    assert verify(folder).sound
    before, after = (sum(spec.spec.nbytes for spec in Checkpoint.open(path).tensors.values())
                     for path in (tiny_resnet, folder))  # fmt: skip
    assert after < 0.65 * before


def test_other_readers_load_it_with_its_code_and_refuse_it_without(
    factorized: dict[str, Path], python: list[str]
) -> None:
    command = [*python, "-c", HIDDEN + READ, *map(str, factorized.values())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", "True"]
    for folder in factorized.values():
        torch.testing.assert_close(torch.load(f"{folder}.pt"), logits(folder))


@pytest.mark.parametrize("name", METHODS)
def test_its_kernels_are_quantized_each_and_not_by_calibrated_methods(
    name: str, factorized: dict[str, Path], tmp_path: Path
) -> None:
    report = run(factorized[name], tmp_path / "out", "quantize", {"name": "rtn", "bits": 8, "granularity": "channel"})
    parts = [row for row in report.layers if ".convolutions." in row.name]
    assert {row.name.rpartition(".")[2] for row in parts} == {"in", "out", *(["core"] if name == "tucker" else [])}
    assert {row.form for row in parts} == {"int_grouped"}
    torch.testing.assert_close(logits(tmp_path / "out"), logits(factorized[name]), atol=0.02, rtol=0)
    assert verify(tmp_path / "out").sound
    np.savez(tmp_path / "images.npz", x=IMAGES.numpy())
    data = {"arrays": str(tmp_path / "images.npz"), "inputs": "x"}
    for method in ("gptq", "imatrix"):
        with pytest.raises(Refused, match=r"convolutions\.out: calibration sees the inputs of whole layers"):
            planned(factorized[name], tmp_path / "no", "quantize", {"name": method, "bits": 4}, calibration=data)
    with pytest.raises(Problems) as caught:
        planned(factorized[name], tmp_path / "no", "factorize", {"name": "svd", "keep": 0.5})
    assert "is a part of a factorized layer already" in str(caught.value.problems[0])


def test_layers_that_a_method_is_not_made_for_stay_and_the_plan_says_so(tiny_resnet: Path, tmp_path: Path) -> None:
    plan = planned(tiny_resnet, tmp_path / "out", "factorize", {"name": "tucker", "keep": 0.5})
    (told,) = (line for line in plan.warnings if "made for" in line)
    assert "shortcut.convolution" in told
    spatial = {"name": "spatial", "keep": 0.5}
    with pytest.raises(RecipeError, match="none of the selected layers is one"):
        planned(tiny_resnet, tmp_path / "no", "factorize", spatial, select={"include": ["*shortcut*"]})


def smooth(images: int, channels: int) -> np.ndarray:
    """Images whose neighbouring positions are alike, (images, channels, 12, 12)."""
    noise = torch.randn(images, channels, 15, 15, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.avg_pool2d(noise, 4, stride=1).numpy()


@pytest.mark.parametrize(
    ("options", "calibrated"), [("", True), (":stride=2,padding=1", True), (":padding=1,groups=2", False)]
)
def test_calibration_knows_what_the_patches_of_a_convolution_hold(
    tmp_path: Path, options: str, calibrated: bool
) -> None:
    """At as many bytes its output changes less than with svd; of grouped channels nothing is known, which is noted."""
    channels = 4 if calibrated else 2
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(channels, 16, 3)})
    source, data = make_file(tmp_path / "in.safetensors", net), tmp_path / "images.npz"
    np.savez(data, x=smooth(8, 4), held=smooth(16, 4)[8:])
    model = {"model": {"sequential": [f"conv{options}", "relu"]}}
    given = {"calibration": {"arrays": str(data), "inputs": "x", "samples": 8}}
    lost, notes = [], []
    for name, more in (("svd", {}), ("whitened", given)):
        out = tmp_path / f"{name}.safetensors"
        report = run(source, out, "factorize", {"name": name, "rank": 4}, **model, **more)
        notes.append(report.layers[0].note)
        wanted, found = (output(path, options, np.load(data)["held"]) for path in (source, out))
        lost.append(float((wanted - found).square().sum()))
    assert (lost[1] < 0.7 * lost[0]) == calibrated
    assert ("data-free" in notes[1]) == (not calibrated)


def output(path: Path, options: str, images: np.ndarray) -> Tensor:
    chain = load_model(path, model=module_for(path, Model(sequential=(f"conv{options}",))))
    with torch.no_grad():
        found: Tensor = chain(torch.from_numpy(images))
    return found
