"""Rotated models: they compute what they did, outliers are gone, and what cannot be rotated is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.views import noise
from aicompress.checkpoint.views.rewritten import RewrittenCheckpoint
from aicompress.errors import Refused
from aicompress.methods import get
from aicompress.methods.layerwise import LayerMethod
from aicompress.model.loading.load import load
from aicompress.pipeline.calibration.request import Request, StepInput
from aicompress.pipeline.layerwise.rotation import rotated
from aicompress.pipeline.layerwise.rows import reading
from aicompress.pipeline.step.input import open_input
from aicompress.recipe import Recipe
from tests import checkpoints
from tests.pipeline.calibration.steps import planned, run, text, write_recipe
from tests.pipeline.families import FAMILIES
from tests.pipeline.layerwise.test_calibrated import require_resumed

FINE = {"name": "hadamard", "untie": True, "base": {"name": "rtn", "bits": 8, "group_size": 8}}
IDS = torch.arange(5, 45).reshape(2, 20)


def logits(folder: Path, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = load(folder, dtype=torch.float32, kernels="reference")(ids).logits
    return found


def view_of(folder: Path, **fields: Any) -> tuple[Checkpoint, list[str]]:
    method = get("quantize", "hadamard")
    assert isinstance(method, LayerMethod)
    recipe = Recipe(version=1, method=method.config(**{"name": "hadamard", "untie": True, **fields}))
    return rotated(StepInput(open_input(folder)[0], recipe, Request()), method)


def save_rotated(folder: Path, out: Path) -> int:
    """Write a rotated checkpoint without quantizing it; returns how many parameters changed."""
    view, _ = view_of(folder)
    shutil.copytree(folder, out)
    state = {name: view.read(name).contiguous() for name in view.parameters()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(view.config))
    before = Checkpoint.open(folder)
    return sum(name not in before.tensors or not torch.equal(before.read(name), t) for name, t in state.items())


def roughen(model: Any) -> None:
    """Give norms weights and biases that are not those of a new model, so that forgetting one shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.4 * torch.rand(len(parameter), generator=generator)


@pytest.mark.parametrize(
    ("name", "changed"),
    [("llama", 39), ("llama-tied", 43), ("qwen3", 39), ("gemma", 39), ("gpt2", 45), ("gpt-neox", 44)],
)
def test_the_rotated_model_computes_the_same(tmp_path: Path, name: str, changed: int) -> None:
    """Two norms and seven matrices in each of four blocks of a Llama, its embedding, last norm and head."""
    family = FAMILIES[name]
    model = family.saved(tmp_path / "in")
    roughen(model)
    model.save_pretrained(tmp_path / "in")
    assert save_rotated(tmp_path / "in", tmp_path / "out") == changed
    before, after = family.output(model), family.output(type(model).from_pretrained(tmp_path / "out").eval())
    assert torch.allclose(after, before, atol=1e-3 * float(before.abs().max()))


@pytest.mark.parametrize("fixture", ["tiny_mixtral", "tiny_qwen_moe"])
def test_routed_experts_read_and_write_the_rotated_stream(
    tmp_path: Path, fixture: str, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(fixture)
    assert save_rotated(source, tmp_path / "out") > 35  # norms of ones stay
    before, after = logits(source), logits(tmp_path / "out")
    assert torch.allclose(after, before, atol=1e-3 * float(before.abs().max()))


@pytest.mark.parametrize(
    ("name", "said"),
    [("bert", "BertLayer"), ("gemma3", "Gemma3DecoderLayer"), ("t5", "T5Block"), ("vit", "before or after")],
)
def test_what_computes_something_else_is_refused(tmp_path: Path, name: str, said: str) -> None:
    FAMILIES[name].saved(tmp_path / "in")
    with pytest.raises(Refused, match=f"cannot be rotated: .*{said}"):
        planned(tmp_path / "in", tmp_path / "out", write_recipe(tmp_path, None, method=FINE))


def test_a_tied_head_is_untied_only_when_asked(tmp_path: Path, tiny_llama: Path) -> None:
    tied = write_recipe(tmp_path, None, method={**FINE, "untie": False})
    with pytest.raises(Refused, match=r"lm_head\.weight shares its matrix") as refusal:
        planned(tiny_llama, tmp_path / "out", tied)
    assert refusal.value.hint == "untie: true gives it one of its own, 65,536 bytes"
    recipe = write_recipe(tmp_path, None, method=FINE)
    plan = planned(tiny_llama, tmp_path / "out", recipe)
    report = run(tiny_llama, tmp_path / "out", recipe)
    assert plan.output.weight_bytes == report.after.weight_bytes
    assert any("lm_head.weight has a matrix of its own now: 65,536 bytes more" in line for line in report.warnings)
    assert report.before.weight_bytes == Checkpoint.open(tiny_llama).source.files[0].stat().st_size
    assert sum(report.before.by_kind.values()) == report.before.weight_bytes
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    before = logits(tiny_llama)
    assert (found - before).norm() < 0.05 * before.norm()


def test_a_large_vocabulary_is_tried_on_its_first_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here 64 of 300: what is found must not change, wherever the padding token lies."""
    checkpoints.make_llama(tmp_path, tied=False, vocab_size=300, pad_token_id=299)
    expected = set(view_of(tmp_path)[0].changes)  # type: ignore[attr-defined]
    monkeypatch.setattr(noise, "ROWS", 64)
    assert set(view_of(tmp_path)[0].changes) == expected  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def outlying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained Llama whose residual stream has three channels twelve times as large as it was, seen and unseen."""
    folder = checkpoints.make_llama(tmp_path_factory.mktemp("outlying"), steps=60, tied=False)
    model = load(folder)
    loud = [5, 23, 40]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, loud] *= 12
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[loud] *= 12
            layer.mlp.down_proj.weight[loud] *= 12
    return checkpoints.save(model, folder, torch.float32, 1)


def kurtosis(rows: Tensor) -> float:
    """Of all numbers together: 3 for Gaussian ones."""
    return float(rows.pow(4).mean() / rows.square().mean().square())


def test_outliers_are_spread(tmp_path: Path, outlying: Path, text_file: Path) -> None:
    before, after = Checkpoint.open(outlying), view_of(outlying)[0]
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        one, other = before.read(name), after.read(name)
        assert other.abs().max() < 0.5 * one.abs().max()
        assert kurtosis(other) < 0.5 * kurtosis(one)
        torch.testing.assert_close(other.norm(), one.norm())
    errors = []
    for number, method in enumerate(({"name": "rtn"}, {"name": "hadamard", "base": {"name": "rtn"}})):
        coarse = {"bits": 4, "granularity": "channel"}
        method = {**method, "base": {**method["base"], **coarse}} if number else {**method, **coarse}
        select = {"kinds": ["linear", "embedding"]}
        run(outlying, tmp_path / str(number), write_recipe(tmp_path, None, method=method, select=select))
        one, other = logits(outlying).log_softmax(-1), logits(tmp_path / str(number)).log_softmax(-1)
        errors.append(float((one.exp() * (one - other)).sum(-1).mean()))
    assert errors[1] < errors[0]


def test_a_stopped_run_goes_on(tmp_path: Path, outlying: Path, text_file: Path) -> None:
    method = {"name": "hadamard", "base": {"name": "gptq", "bits": 4, "group_size": 16, "refine": 0}}
    recipe = write_recipe(tmp_path, text(text_file), method=method)
    require_resumed(outlying, tmp_path, recipe, "model.layers.1.mlp.down_proj.weight")


def test_bfloat16_in_shards(tmp_path: Path, tiny_llama_bf16: Path) -> None:
    run(tiny_llama_bf16, tmp_path / "out", write_recipe(tmp_path, None, method=FINE))
    before = logits(tiny_llama_bf16)
    assert (logits(tmp_path / "out") - before).norm() < 0.1 * before.norm()
    assert Checkpoint.open(tmp_path / "out").specs["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_what_reads_the_stream_is_rotated_in_blocks_of_rows(
    tmp_path: Path, tiny_llama_bf16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So are embeddings; only what writes the stream, whose rows are mixed, is read whole."""
    view, _ = view_of(tiny_llama_bf16)
    embedding = "model.embed_tokens.weight"
    blocks = [view.rows(embedding, start, start + 32) for start in range(0, view.tensors[embedding].spec.shape[0], 32)]
    torch.testing.assert_close(torch.cat(blocks).to(torch.bfloat16), view.read(embedding))
    monkeypatch.setattr(reading, "BLOCK", 1 << 10)
    whole, exact = set[str](), RewrittenCheckpoint.exact
    monkeypatch.setattr(RewrittenCheckpoint, "exact", lambda own, name: whole.add(name) or exact(own, name))
    run(tiny_llama_bf16, tmp_path / "out", write_recipe(tmp_path, None, method=FINE))
    kinds = {name.rpartition(".")[0].rpartition(".")[2] for name in whole if view.tensors[name].spec.shape[1:]}
    assert kinds == {"o_proj", "down_proj"}


def test_what_does_not_go_together_is_refused(
    tmp_path: Path, tiny_llama_untied: Path, text_file: Path, mlp_file: Path
) -> None:
    method = {"name": "hadamard", "base": {"name": "gptq", "bits": 4, "group_size": 16}}
    recipe = write_recipe(tmp_path, text(text_file), method=method)
    with pytest.raises(Refused, match="files of statistics hold those of models as they are"):
        planned(tiny_llama_untied, tmp_path / "out", recipe, Request(stats=(tmp_path / "s.safetensors",)))
    run(tiny_llama_untied, tmp_path / "int8", write_recipe(tmp_path, None, method={"name": "rtn", "preset": "W8A16"}))
    with pytest.raises(Refused, match="is compressed already"):
        planned(tmp_path / "int8", tmp_path / "out", write_recipe(tmp_path, None, method=FINE))
    with pytest.raises(Refused, match="how its layers are connected"):
        planned(mlp_file, tmp_path / "out.safetensors", write_recipe(tmp_path, None, method=FINE))
