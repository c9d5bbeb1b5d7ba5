"""Experts that lie in one tensor of three axes: compressed as matrices, or left with a word on how much that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import aicompress
from aicompress.checkpoint import Checkpoint
from aicompress.pipeline import steps
from aicompress.pipeline.inspect import inspect
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.verify import verify
from aicompress.recipe import load

OFF = Options(latency="off")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
EXPERTS = [f"model.layers.{n}.mlp.experts.{part}_proj" for n in range(2) for part in ("gate_up", "down")]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of eight experts, nine tenths of the model."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    torch.manual_seed(0)
    mixture = {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2}
    hf.GptOssForCausalLM(hf.GptOssConfig(**SHAPE, **TEXT, **mixture, sliding_window=8)).eval().save_pretrained(folder)
    return folder


def compressed(source: Path, out: Path, recipe: str, *overrides: str) -> Any:
    command = recipe.split("/")[0]
    step = steps.make_plan(source, Destination(out), load(recipe, command, overrides), command)
    report = steps.run(step, OFF)
    assert step.summary().weight_bytes == report.after.weight_bytes
    return report


def test_they_are_quantized_as_each_by_itself(gpt_oss: Path, tmp_path: Path) -> None:
    report = compressed(gpt_oss, tmp_path / "w8", "quantize/rtn-w4", "method.bits=8", "method.group_size=32")
    assert report.after.weight_bytes < 0.4 * report.before.weight_bytes
    assert set(EXPERTS) <= {row.name for row in report.layers if row.form == "int_grouped"}
    given, written = load_file(gpt_oss / "model.safetensors"), Checkpoint.open(tmp_path / "w8")
    for name in EXPERTS:
        expert = given[name][3]  # as a matrix of its own: the same codes
        groups = expert.reshape(-1, 32)
        scale = (groups.abs().amax(dim=1, keepdim=True) / 127.5).half().float()
        alone = ((groups / scale).round().clamp(-128, 127) * scale).reshape(expert.shape)
        assert torch.equal(written.dense(name)[3], alone)
    assert not verify(tmp_path / "w8").problems
    ids = torch.arange(4, 28).view(2, 12)
    with torch.no_grad():
        before = aicompress.load(gpt_oss)(ids).logits
        after = aicompress.load(tmp_path / "w8")(ids).logits
    assert 0 < (after - before).norm() < 0.3 * before.norm()  # other experts are chosen here and there
    assert any("loads by aicompress.load" in line for line in report.warnings)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("quantize/rtn-w8", []),
        ("quantize/rtn-range", ["method.max_error=0.2"]),
        ("quantize/hqq-w4", []),
        ("quantize/nf4", []),
        ("quantize/kmeans-w4", []),
        ("prune/magnitude-90-sparse", []),
    ],
)
def test_every_method_that_needs_no_data_takes_them(
    recipe: str, overrides: list[str], gpt_oss: Path, tmp_path: Path
) -> None:
    report = compressed(gpt_oss, tmp_path / "out", recipe, *overrides)
    rows = [row for row in report.layers if row.name in EXPERTS]
    assert len(rows) == 4
    assert all(row.bytes_after < 0.45 * row.bytes_before and row.form != "dense" for row in rows)
    assert report.untouched.share < 0.1


def test_a_method_that_cannot_take_them_says_so(gpt_oss: Path, tmp_path: Path) -> None:
    report = compressed(gpt_oss, tmp_path / "out", "factorize/tie")
    assert all(row.form == "dense" for row in report.layers if row.name in EXPERTS)
    (told,) = (line for line in report.warnings if "tensors that hold all experts of a block" in line)
    assert "tie compresses several layers together; a step of svd, activation, dictionary or others can" in told
    assert report.untouched.share > 0.8
    assert set(report.untouched.largest) <= set(EXPERTS)


def test_a_compressed_one_is_pruned_by_experts(gpt_oss: Path, tmp_path: Path) -> None:
    compressed(gpt_oss, tmp_path / "w4", "quantize/rtn-w4", "method.group_size=32")
    report = compressed(tmp_path / "w4", tmp_path / "few", "prune/experts-norm", "method.sparsity=0.5")
    whole, few = Checkpoint.open(tmp_path / "w4"), Checkpoint.open(tmp_path / "few")
    for name in EXPERTS:
        assert name in few.manifest.entries
        before, after = whole.dense(name), few.dense(name)
        assert all(any(torch.equal(expert, other) for other in before) for expert in after)
        assert len(after) == 4
    assert report.after.weight_bytes < report.before.weight_bytes


def test_they_are_inspected_as_experts(gpt_oss: Path) -> None:
    kinds = {row.name: row.kind for row in inspect(gpt_oss).rows}
    assert {kinds[name] for name in EXPERTS} == {"experts"}
