"""A stored form is one file: what is written here as a form runs through reading, running, reports and transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import aicompress.weights.stored
from aicompress.checkpoint import Checkpoint
from aicompress.layer import LayerInfo
from aicompress.model.loading.load import load
from aicompress.pipeline.inspect import inspect
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise.run import run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.verify import verify
from aicompress.recipe import load as load_recipe
from aicompress.weights import Weight, forms
from aicompress.weights.decoding import DECODERS
from tests.model.compressed import compress

FORM = '''
"""-1, 0 or 1 times a scale per row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.decoding import Meta, Tensors, decoder, unpack
from aicompress.weights.form import Weight
from aicompress.weights.coding.packing import pack_rows, unpack_rows


@dataclass(frozen=True)
class Ternary(Weight):
    form: ClassVar[str] = "ternary"
    signs: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.signs.shape[0], self.signs.shape[1])

    @classmethod
    def of(cls, matrix: Tensor) -> Ternary:
        scale = matrix.abs().mean(dim=1, keepdim=True)
        return cls((matrix / scale).round().clamp(-1, 1).to(torch.int8), scale)

    def tensors(self) -> dict[str, Tensor]:
        return {"": pack_rows(self.signs, 2, 2).reshape(-1), "scale": self.scale}

    def meta(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.shape)}

    def describe(self) -> str:
        return "signs and zeros"

    def dense(self) -> Tensor:
        return self.signs.float() * self.scale.float()

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Ternary:
        out, columns = meta["shape"]
        return cls(unpack_rows(tensors[""].reshape(out, -1), 2, columns, 2), tensors["scale"])


@decoder("ternary")
def decode_ternary(meta: Meta, tensors: Tensors) -> Tensor:
    out, columns = meta["shape"]
    return (unpack(tensors[""].reshape(out, -1), 2, columns).float() - 2) * tensors["scale"]
'''
IDS = torch.arange(2, 26).reshape(2, 12)


@pytest.fixture
def ternary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class of a form whose file lies in a folder of its own."""
    folder = tmp_path / "forms"
    folder.mkdir()
    (folder / "ternary.py").write_text(FORM)
    monkeypatch.setattr(aicompress.weights.stored, "__path__", [*aicompress.weights.stored.__path__, str(folder)])
    forms.cache_clear()
    yield forms()["ternary"]
    monkeypatch.undo()
    del DECODERS["ternary"], sys.modules["aicompress.weights.stored.ternary"], aicompress.weights.stored.ternary  # type: ignore[attr-defined]
    forms.cache_clear()


@torch.no_grad()
def test_one_file_is_enough(ternary: Any, tiny_llama: Path, tmp_path: Path, python: list[str]) -> None:
    def pick(info: LayerInfo, matrix: torch.Tensor) -> Weight | None:
        return ternary.of(matrix) if info.name.endswith("up_proj") else None

    path = compress(tiny_llama, tmp_path / "ternary", pick)
    name = "model.layers.0.mlp.up_proj"
    original = ternary.of(Checkpoint.open(tiny_llama).dense(f"{name}.weight"))

    read = Checkpoint.open(path).weight(f"{name}.weight")
    assert isinstance(read, ternary)
    assert torch.equal(read.dense(), original.dense())
    assert verify(path).sound
    row = next(row for row in inspect(path).rows if row.name == name)
    assert (row.form, row.detail, row.numbers) == ("ternary", "signs and zeros", 128 * 64)

    reference = load(path, kernels="reference")(IDS).logits
    torch.testing.assert_close(load(path)(IDS).logits, reference, rtol=1e-4, atol=1e-4)
    code = (
        "import sys; sys.modules['aicompress'] = None; import torch, transformers\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "with torch.no_grad(): torch.save(m(torch.arange(2, 26).reshape(2, 12)).logits, sys.argv[2])\n"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "hf"),
    }
    command = [*python, "-c", code, str(path), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), reference)


def test_a_later_step_keeps_or_compresses_it(ternary: Any, tiny_llama: Path, tmp_path: Path) -> None:
    path = compress(tiny_llama, tmp_path / "ternary", lambda info, w: ternary.of(w) if "_proj" in info.name else None)
    recipe = tmp_path / "recipe.yaml"
    select = {"include": ["*.down_proj"]}
    recipe.write_text(json.dumps({"version": 1, "method": {"name": "rtn", "bits": 4}, "select": select}))
    loaded = load_recipe(str(recipe), "quantize")
    plan = planner.make_plan(path, Destination(tmp_path / "out"), loaded, "quantize")
    report = run(plan, Options(latency="off"))
    assert plan.output.weight_bytes == report.after.weight_bytes
    assert report.after.parameters == report.before.parameters
    written = {info.name: info.stored for info in Checkpoint.open(tmp_path / "out").layers()}
    assert written["model.layers.0.mlp.up_proj"] == "ternary"
    assert written["model.layers.0.mlp.down_proj"] == "int_grouped"


def test_two_forms_of_one_name_are_refused(ternary: Any, tmp_path: Path) -> None:
    (tmp_path / "forms" / "other.py").write_text(FORM)
    forms.cache_clear()
    with pytest.raises(TypeError, match="two stored forms are named 'ternary'"):
        forms()
    del sys.modules["aicompress.weights.stored.other"], aicompress.weights.stored.other  # type: ignore[attr-defined]
    (tmp_path / "forms" / "other.py").unlink()
    forms.cache_clear()
