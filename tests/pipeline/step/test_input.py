"""What `verify` calls unsound no step and no evaluation works on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aicompress import recipe as recipes
from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError, CompressError
from aicompress.methods import get, methods
from aicompress.pipeline import steps
from aicompress.pipeline.distillation.plan import make_plan as plan_distillation
from aicompress.pipeline.evaluation.run import evaluate
from aicompress.pipeline.step.input import open_input
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.verify import verify
from aicompress.recipe import Calibration, Recipe, distillation
from aicompress.recipe.evaluation import EvalRecipe

NORM, GATE = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.gate_proj.weight"


def renamed(folder: Path) -> str:
    """A norm under another name, which transformers fills with ones."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.norm_of_input.weight"] = tensors.pop(NORM)
    save_file(tensors, folder / "model.safetensors")
    return f"{NORM} is missing"


def reshaped(folder: Path) -> str:
    """A width that the tensors do not have."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    return r"\[128, 64\], config.json says \[96, 64\]"


def retyped(folder: Path) -> str:
    """Integers where the architecture has real numbers."""
    tensors = load_file(folder / "model.safetensors")
    tensors[GATE] = tensors[GATE].to(torch.int32)
    save_file(tensors, folder / "model.safetensors")
    return f"{GATE} holds integers"


@pytest.mark.parametrize("damage", [renamed, reshaped, retyped])
def test_a_checkpoint_that_is_not_its_architectures_is_refused_before_work(
    damage: Callable[[Path], str], tiny_llama: Path, heldout_file: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "in"))
    message = damage(source)
    assert not verify(source).sound
    out = Destination(tmp_path / "out")
    for name in ("quantize/rtn-w8", "prune/magnitude-50", "prune/width-50", "prune/depth-2", "factorize/svd-energy"):
        verb = name.partition("/")[0]
        with pytest.raises(CheckpointError, match=message):
            steps.make_plan(source, out, recipes.load(name, verb, []), verb)
    taught = distillation.load("distill/kl", [f"data.text={heldout_file}"])
    for student, teacher in ((source, tiny_llama), (tiny_llama, source)):
        with pytest.raises(CheckpointError, match=message):
            plan_distillation(student, teacher, out, taught)
    for against in ([], [str(source)]):
        with pytest.raises(CheckpointError, match=message):
            evaluate(str(tiny_llama if against else source), against, EvalRecipe(version=1))
    assert not out.path.exists()


STEPS = [(command, name) for command in ("factorize", "quantize", "prune") for name in methods(command)]


def test_every_method_refuses_it(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "in"))
    message = renamed(source)
    for command, name in STEPS:
        config = get(command, name).config
        examples = (config.model_config.get("json_schema_extra") or {}).get("examples") or [{}]  # type: ignore[union-attr]
        recipe = Recipe(version=1, method=config(**{**examples[0], "name": name}), calibration=Calibration(drawn=2))
        with pytest.raises(CompressError) as refusal:
            steps.make_plan(source, Destination(tmp_path / "out"), recipe, command)
        assert message in str(refusal.value) or name == "channels", (command, name, refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_pooler_may_be_missing(tiny_bert: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_bert, tmp_path / "in"))
    tensors = load_file(source / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "pooler" not in name}, source / "model.safetensors")
    assert verify(source).sound
    checkpoint, _ = open_input(source)
    assert len(checkpoint.parameters()) < len(Checkpoint.open(tiny_bert).parameters())


def test_a_config_that_names_another_dtype_is_told(tiny_llama: Path, tiny_llama_bf16: Path, tmp_path: Path) -> None:
    for number, (source, said, told) in enumerate(
        ((tiny_llama, "bfloat16", True), (tiny_llama_bf16, "float32", True), (tiny_llama_bf16, "bfloat16", False))
    ):
        folder = Path(shutil.copytree(source, tmp_path / str(number)))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": said}))
        _, warnings = open_input(folder)
        assert any(f"config.json says {said} and the weights are" in line for line in warnings) == told
