"""Modes that compare a student with its teacher layer by layer, or block by block: they win back what was lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from aicompress.checkpoint import Checkpoint
from aicompress.errors import Refused
from aicompress.model.blocks.paused_forward import Runs
from aicompress.model.distillation.corrections import Pair, correct
from aicompress.pipeline.distillation.plan import DistillPlan, make_plan
from aicompress.pipeline.distillation.run import run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import load
from tests.model.compressed import compress, integers


def planned(student: Path, teacher: Path, out: Path, sections: dict[str, Any]) -> DistillPlan:
    training = {"steps": 4, "batch": 8, "held_out": 0.1, "precision": "fp32"}
    plain = {"version": 1, "training": training, "report": {"html": False}, **sections}
    recipe = out.parent / "recipe.json"
    recipe.write_text(json.dumps(plain))
    return make_plan(student, teacher, Destination(out), load(str(recipe)))


def test_blocks_win_back_most_of_what_two_bits_lose(trained_llama: Path, text_file: Path, tmp_path: Path) -> None:
    def pick(info: Any, matrix: torch.Tensor) -> Any:
        return integers(matrix, 2, 16) if info.kind == "linear" else None

    student = compress(trained_llama, tmp_path / "student", pick)
    mode = {"name": "blocks", "steps": 24, "samples": 32, "scale_rate": 0.01, "factor_rate": 0.01}
    sections = {"mode": mode, "method": {"name": "kl"}, "data": {"text": str(text_file), "length": 32}}
    report = run(planned(student, trained_llama, tmp_path / "out", sections), Options(latency="off"))
    assert report.training["held_out_after"] < 0.7 * report.training["held_out_before"]
    before, after = Checkpoint.open(student), Checkpoint.open(tmp_path / "out")
    moved = {name for name in before.tensors if not torch.equal(before.read(name), after.read(name))}
    block = "model.layers.0."
    kinds = ("mlp.up_proj.weight_packed", "mlp.up_proj.weight_scale", "input_layernorm.weight")
    assert {block + name for name in kinds} <= moved
    assert all(name.startswith("model.layers.") for name in moved)


def test_statistics_of_batch_norms_are_those_of_the_student(cnn_file: Path, digits_npz: Path, tmp_path: Path) -> None:
    student = compress(cnn_file, tmp_path / "student.safetensors", lambda info, matrix: integers(matrix, 2))
    model = {"sequential": ["conv1", "bn1", "relu", "maxpool:2", "conv2", "bn2", "relu", "maxpool:2", "flatten", "fc"]}
    data = {"arrays": str(digits_npz), "inputs": "train_images", "scale": 255}
    sections = {"mode": "norms", "method": {"name": "mse"}, "data": data, "model": model}
    out = tmp_path / "out.safetensors"
    report = run(planned(student, cnn_file, out, sections), Options(latency="off"))
    assert report.training["held_out_after"] < 0.9 * report.training["held_out_before"]
    before, after = Checkpoint.open(student), Checkpoint.open(out)
    moved = {name for name in before.tensors if not torch.equal(before.read(name), after.read(name))}
    assert {"bn1.running_mean", "bn1.running_var", "bn2.running_mean", "fc.bias"} <= moved
    assert not any(name.endswith(".weight") for name in moved)


def test_routers_that_give_several_outputs_keep_their_biases(
    trained_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    shape = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = GptOssForCausalLM(GptOssConfig(**shape, eos_token_id=1, pad_token_id=0))
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias.normal_()
    shutil.copytree(trained_llama, tmp_path / "moe")
    model.save_pretrained(tmp_path / "moe")
    student = compress(
        tmp_path / "moe", tmp_path / "student", lambda info, m: integers(m, 2, 16) if "q_proj" in info.name else None
    )
    data = {"text": str(text_file), "length": 16, "samples": 12}
    sections = {"mode": "norms", "method": {"name": "kl"}, "data": data}
    run(planned(student, tmp_path / "moe", tmp_path / "out", sections), Options(latency="off"))
    before, after = Checkpoint.open(student), Checkpoint.open(tmp_path / "out")
    moved = {name for name in before.tensors if not torch.equal(before.read(name), after.read(name))}
    assert not any("router" in name for name in moved)


def test_corrections_by_hand() -> None:
    """A bias takes up the lost mean, and a norm has its spread and mean back; padding counts for nothing."""
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    student = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        student[0].weight.add_(0.3)
        teacher[1].weight.mul_(1.5)
    batches = [torch.randn(5, 6, 4) + 1 for _ in range(2)]
    masks = [torch.ones(5, 6, dtype=torch.bool) for _ in batches]
    for batch, mask in zip(batches, masks, strict=True):
        mask[:, 4:] = False
        batch[:, 4:] = 1e3
    layers = [
        Pair(own, its, {name: t for name, t in own.named_parameters() if t.ndim == 1}, -1)
        for own, its in zip(student, teacher, strict=True)
    ]
    runs = [Runs(list(side), [lambda b=b, side=side: side(b) for b in batches]) for side in (student, teacher)]
    correct(layers, runs, masks)
    real = torch.cat([batch[mask] for batch, mask in zip(batches, masks, strict=True)])
    with torch.no_grad():
        torch.testing.assert_close(student[0](real).mean(0), teacher[0](real).mean(0))
        ours, theirs = student(real), teacher(real)
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=1e-4, atol=1e-4)


def test_a_teacher_that_is_no_twin_is_refused(
    trained_llama: Path, shallow_llama: Path, tiny_bert: Path, wide_bert: Path, text_file: Path, tmp_path: Path
) -> None:
    kl = {"method": {"name": "kl"}, "data": {"text": str(text_file), "length": 32}}
    with pytest.raises(Refused, match=r"mode blocks compares layers of one name: the teacher has no model\.layers"):
        planned(trained_llama, shallow_llama, tmp_path / "out", {"mode": "blocks", **kl})
    similar = {**kl, "method": {"name": "embedding", "cosine": 0, "similarity": 1}}
    with pytest.raises(Refused, match=r"mode norms compares layers of one name: .* numbers, the teacher's"):
        planned(tiny_bert, wide_bert, tmp_path / "out", {"mode": "norms", **similar})
