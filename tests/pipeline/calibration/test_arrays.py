"""Ready tensors calibrate models of images, sound, and several inputs together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError, Problems
from aicompress.model.loading.load import build
from aicompress.pipeline.calibration.arguments import argument_problems
from aicompress.pipeline.calibration.data import calibration_inputs
from aicompress.pipeline.step.workers import Processes
from aicompress.recipe import Calibration
from aicompress.report.model import Report
from tests.pipeline.calibration.steps import GPTQ, planned, run, write_recipe
from tests.pipeline.families import FAMILIES

EIGHT_BITS = {**GPTQ, "bits": 8, "group_size": 8}
LINEAR = {"kinds": ["linear"]}
SIDE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PAIRS = {
    "input_ids": torch.randint(3, 60, (20, 7), generator=torch.Generator().manual_seed(0), dtype=torch.int32),
    "attention_mask": torch.ones(20, 7, dtype=torch.bool),
    "pixel_values": torch.randint(0, 255, (20, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of one block a side, with a file of pairs of texts and images."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {**SIDE, "vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**SIDE, "image_size": 8, "patch_size": 4}
    hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    save_file(PAIRS, folder / "pairs.safetensors")
    return folder


def all_calibrated(report: Report) -> bool:
    changed = [row for row in report.layers if row.method != "-"]
    return bool(changed) and not [row for row in changed if "data-free" in row.note]


class Passing(hf.LlamaModel):
    """A model that hands all but the tokens to one inside it."""

    def __init__(self, config: hf.LlamaConfig) -> None:
        super().__init__(config)
        self.inner = hf.LlamaModel(config)

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.inner(input_ids, **kwargs)


def test_arrays_for_a_model_inside_are_taken(clip: Path) -> None:
    with torch.device("meta"):
        model = Passing(hf.LlamaConfig(**SIDE, vocab_size=64))
    for names, told in (
        (["input_ids", "attention_mask"], []),
        (["input_ids", "attention_maks"], ["inputs: Passing takes no 'attention_maks'"]),
        (["input_ids", "input"], ["inputs: Passing takes no 'input'"]),  # which layers have an argument for
    ):
        data = Calibration(arrays=str(clip / "pairs.safetensors"), inputs=names)
        absent = [problem.message for problem in argument_problems(model, data, 0) if "takes no" in problem.message]
        assert absent == told


def test_several_inputs_run_together(clip: Path, tmp_path: Path) -> None:
    data: dict[str, Any] = {"arrays": str(clip / "pairs.safetensors"), "inputs": list(PAIRS), "scale": 255}
    report = run(clip, tmp_path / "out", write_recipe(tmp_path, data, method=EIGHT_BITS))
    assert all_calibrated(report)
    assert {row.name.partition(".")[0] for row in report.layers if row.method != "-"} >= {"text_model", "vision_model"}
    checkpoint = Checkpoint.open(clip)
    calibration = Calibration(**{**data, "samples": 3})
    (batch,) = calibration_inputs(checkpoint, build(checkpoint), calibration, 0, Processes()).batches
    assert {name: (each.dtype, len(each)) for name, each in batch.items()} == {
        "input_ids": (torch.int64, 3),
        "attention_mask": (torch.int64, 3),
        "pixel_values": (torch.float32, 3),
    }
    assert float(batch["pixel_values"].max()) <= 1


def test_images_and_sound_in_a_file_of_tensors(tmp_path: Path, tiny_vit: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 1, 28, 28, generator=generator).bfloat16()
    save_file({"pixel_values": images, "x": torch.randn(40, 8, 32, generator=generator)}, tmp_path / "a.safetensors")
    data = {"arrays": str(tmp_path / "a.safetensors"), "inputs": "pixel_values"}
    assert all_calibrated(
        run(tiny_vit, tmp_path / "vit", write_recipe(tmp_path, data, method=EIGHT_BITS, select=LINEAR))
    )
    FAMILIES["whisper"].saved(tmp_path / "whisper")
    data["inputs"] = "x"  # what the model calls its input need not be the array's name
    recipe = write_recipe(tmp_path, data, method=EIGHT_BITS, select=LINEAR)
    assert all_calibrated(run(tmp_path / "whisper", tmp_path / "out", recipe))


def refused(source: Path, folder: Path, data: dict[str, Any]) -> str:
    with pytest.raises(CompressError) as caught:
        planned(source, folder / "out", write_recipe(folder, data, method=EIGHT_BITS))
    problems = caught.value.problems if isinstance(caught.value, Problems) else (caught.value,)
    return "\n".join(f"{problem.message} | {problem.hint}" for problem in problems)


def test_what_does_not_fit_is_refused_before_work(clip: Path, tmp_path: Path) -> None:
    stored = str(clip / "pairs.safetensors")
    wrong = refused(clip, tmp_path, {"arrays": stored, "inputs": ["input_id", "pixel_values"]})
    assert "no array 'input_id' | did you mean 'input_ids'?" in wrong
    shorter = {**PAIRS, "pixel_values": PAIRS["pixel_values"][:19], "pixels": PAIRS["pixel_values"].clone()}
    for name, save in (("a.safetensors", save_file), ("a.npz", save_npz)):
        save(shorter, tmp_path / name)
        told = refused(clip, tmp_path, {"arrays": str(tmp_path / name), "inputs": ["input_ids", "pixel_values"]})
        assert "'input_ids' is (20, 7) and 'pixel_values' is (19, 3, 8, 8)" in told
        told = refused(clip, tmp_path, {"arrays": str(tmp_path / name), "inputs": ["input_ids", "pixels"]})
        assert "CLIPModel takes no 'pixels' | did you mean 'pixel_values'?" in told
    (tmp_path / "a.safetensors").write_bytes(b"no tensors at all")
    told = refused(clip, tmp_path, {"arrays": str(tmp_path / "a.safetensors"), "inputs": "x"})
    assert "no .safetensors file that can be read" in told


def save_npz(named: dict[str, torch.Tensor], path: Path) -> None:
    np.savez(path, **{name: each.numpy() for name, each in named.items()})


def test_a_wrong_shape_is_refused_before_work(clip: Path, tmp_path: Path) -> None:
    save_file({**PAIRS, "pixel_values": torch.rand(20, 3, 9, 9)}, tmp_path / "a.safetensors")
    data = {"arrays": str(tmp_path / "a.safetensors"), "inputs": list(PAIRS)}
    told = refused(clip, tmp_path, data)
    assert "CLIPModel does not run on" in told
    assert "pixel_values (20, 3, 9, 9) of a.safetensors: Input image size (9*9) doesn't match model" in told
    assert "check their shapes" in told
