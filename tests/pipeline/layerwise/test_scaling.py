"""Models that are rescaled before they are compressed: what is written computes the same, in one run or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import Refused
from aicompress.model.loading.load import load
from aicompress.pipeline.calibration import runner as engine
from aicompress.pipeline.calibration.request import Request
from tests import checkpoints
from tests.pipeline.calibration.steps import planned, run, text, write_recipe
from tests.pipeline.layerwise.test_calibrated import require_resumed, weights
from tests.pipeline.ranks import Ranks

AWQ = {"name": "awq", "bits": 8, "group_size": 16, "symmetric": False, "base": {"name": "rtn"}, "steps": 4}
SMOOTH = {"name": "smoothquant"}
IDS = torch.arange(5, 45).reshape(2, 20)


@pytest.fixture(scope="module")
def outlying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tied Llama with four channels of its norms' outputs thirty times as large, and their readers' as small."""
    folder = checkpoints.make_llama(tmp_path_factory.mktemp("outlying"), steps=60)
    model = load(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[3::16] *= 30
                for reader in readers:
                    reader.weight[:, 3::16] /= 30
    return checkpoints.save(model, folder, torch.float32, 1)


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return load(folder)(IDS).logits.log_softmax(-1)


def divergence(folder: Path, original: Path) -> float:
    """KL per token."""
    one, other = logits(original), logits(folder)
    return float((one.exp() * (one - other)).sum(-1).mean())


def test_norms_are_rewritten_and_the_model_stays(tmp_path: Path, outlying: Path, text_file: Path) -> None:
    report = run(outlying, tmp_path / "out", write_recipe(tmp_path, text(text_file), method=AWQ))
    before, after = Checkpoint.open(outlying), Checkpoint.open(tmp_path / "out")
    norms = [name for name in before.tensors if "layernorm" in name]
    assert sum(not torch.equal(before.read(name), after.read(name)) for name in norms) >= 3
    rows = {row.name: row.note for row in report.layers if row.method == "awq"}
    assert len(rows) == 21
    assert sum("rescaled with exponent" in note for note in rows.values()) >= 12
    assert divergence(tmp_path / "out", outlying) < 1e-4
    for row in report.layers:  # a gate's columns alone are rescaled, by what its norm lost
        if row.name.endswith("gate_proj"):
            norm = f"{row.name.removesuffix('mlp.gate_proj')}post_attention_layernorm.weight"
            original, gained = before.read(f"{row.name}.weight"), before.read(norm) / after.read(norm)
            own = after.dense(f"{row.name}.weight") / gained
            assert row.rel_error == pytest.approx(float((own - original).norm() / original.norm()), rel=1e-2)
    summary = planned(outlying, tmp_path / "again", write_recipe(tmp_path, text(text_file), method=AWQ)).summary()
    assert summary.weight_bytes == report.after.weight_bytes


@pytest.mark.parametrize("base", ["rtn", "gptq"])
def test_awq_beats_its_base_where_channels_stand_out(
    tmp_path: Path, outlying: Path, text_file: Path, base: str
) -> None:
    found = []
    for number, method in enumerate(({"name": base}, {"name": "awq", "base": {"name": base}, "steps": 8})):
        method = {"bits": 3, "group_size": 32, **method}
        run(outlying, tmp_path / str(number), write_recipe(tmp_path, text(text_file, samples=64), method=method))
        found.append(divergence(tmp_path / str(number), outlying))
    assert found[1] < found[0]


def test_smoothquant_beats_plain_w8a8_where_channels_stand_out(tmp_path: Path, outlying: Path, text_file: Path) -> None:
    found = []
    for number, method in enumerate(({"name": "rtn", "preset": "W8A8"}, SMOOTH)):
        data = text(text_file) if number else None
        run(outlying, tmp_path / str(number), write_recipe(tmp_path, data, method=method))
        found.append(divergence(tmp_path / str(number), outlying))
    assert found[1] < 0.7 * found[0]


def test_what_is_written_loads_in_transformers(tmp_path: Path, outlying: Path, text_file: Path) -> None:
    from transformers import AutoModelForCausalLM

    run(outlying, tmp_path / "out", write_recipe(tmp_path, text(text_file), method={**AWQ, "symmetric": True}))
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
        expected = load(tmp_path / "out", kernels="reference")(IDS).logits
    assert torch.allclose(found, expected, atol=1e-3)


def test_a_layer_that_is_not_selected_is_rescaled_all_the_same(tmp_path: Path, outlying: Path, text_file: Path) -> None:
    select = {"include": ["*.q_proj", "*.gate_proj"]}
    run(outlying, tmp_path / "out", write_recipe(tmp_path, text(text_file), method=AWQ, select=select))
    before, after = Checkpoint.open(outlying), Checkpoint.open(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    assert after.layout == "compressed-tensors"
    assert not torch.equal(before.read(name), after.read(name))
    assert divergence(tmp_path / "out", outlying) < 1e-4


@pytest.mark.parametrize("where", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_stopped_run_goes_on(tmp_path: Path, outlying: Path, text_file: Path, where: str) -> None:
    require_resumed(outlying, tmp_path, write_recipe(tmp_path, text(text_file), method=AWQ), where)


@pytest.mark.parametrize("method", [AWQ, SMOOTH], ids=["awq", "smoothquant"])
def test_statistics_from_a_file(
    tmp_path: Path, outlying: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    stats = Request(stats=(tmp_path / "stats.safetensors",))
    run(outlying, tmp_path / "one", write_recipe(tmp_path, text(text_file), method=method), stats)
    monkeypatch.setattr(engine, "walk", None)
    report = run(outlying, tmp_path / "two", write_recipe(tmp_path, None, method=method), stats)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert any(row.note for row in report.layers if row.method != "-")
    assert divergence(tmp_path / "two", outlying) < 1e-3


@pytest.mark.parametrize("fixture", ["tiny_llama_bf16", "tiny_gpt2", "tiny_bert"])
def test_other_models(tmp_path: Path, text_file: Path, fixture: str, request: pytest.FixtureRequest) -> None:
    """bfloat16 in shards, transposed and fused layers, post-norm: what they compute hardly changes."""
    source: Path = request.getfixturevalue(fixture)
    method = {**AWQ, "group_size": 8, "scale_dtype": "float32"}
    report = run(source, tmp_path / "out", write_recipe(tmp_path, text(text_file), method=method))
    assert any("rescaled" in row.note for row in report.layers)
    one, other = load(source, dtype=torch.float32), load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        before, after = one(IDS)[0], other(IDS)[0]
    plain = run(
        source,
        tmp_path / "plain",
        write_recipe(
            tmp_path, None, method={k: v for k, v in method.items() if k not in ("base", "steps")} | {"name": "rtn"}
        ),
    )
    assert plain.after.weight_bytes == report.after.weight_bytes
    with torch.no_grad():
        reference = load(tmp_path / "plain", dtype=torch.float32)(IDS)[0]
    assert (after - before).norm() < 2 * (reference - before).norm()


def test_a_router_takes_the_factors_up(tmp_path: Path, tiny_mixtral: Path, text_file: Path) -> None:
    """A router is not quantized: the product of the norm's weight and its columns stays."""
    select = {"include": ["model.layers.*"]}
    method = {**AWQ, "group_size": 8}
    run(tiny_mixtral, tmp_path / "out", write_recipe(tmp_path, text(text_file), method=method, select=select))
    before, after = Checkpoint.open(tiny_mixtral), Checkpoint.open(tmp_path / "out")
    changed = 0
    for block in (0, 1):
        norm = f"model.layers.{block}.post_attention_layernorm.weight"
        gate = f"model.layers.{block}.block_sparse_moe.gate.weight"
        products = [opened.dense(gate) * opened.dense(norm) for opened in (before, after)]
        torch.testing.assert_close(products[0], products[1])
        changed += not torch.equal(before.dense(gate), after.dense(gate))
    assert changed


def test_two_processes_give_what_one_gives(tmp_path: Path, outlying: Path, text_file: Path, ranks: Ranks) -> None:
    far = {**AWQ, "steps": 1}  # of exponents that lie close together the last bit of a sum would choose
    recipe = write_recipe(tmp_path, text(text_file, samples=3), method=far)
    run(outlying, tmp_path / "one", recipe)
    ranks.together(outlying, tmp_path / "two", recipe)
    one, two = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "two")
    for name in one.parameters():
        apart = (one.dense(name) - two.dense(name)).abs()
        assert apart.max() <= 0.02 * one.dense(name).abs().max()
    assert divergence(tmp_path / "two", outlying) < 1e-4


def test_what_cannot_be_rescaled_is_refused(tmp_path: Path, tiny_llama: Path, tiny_bert: Path, text_file: Path) -> None:
    recipe = write_recipe(tmp_path, text(text_file), method=AWQ, select={"include": ["*.intermediate.dense"]})
    with pytest.raises(Refused, match="can rescale none"):
        planned(tiny_bert, tmp_path / "out", recipe)
    run(tiny_llama, tmp_path / "int8", write_recipe(tmp_path, None, method={"name": "rtn", "preset": "W8A16"}))
    with pytest.raises(Refused, match="compressed already"):
        planned(tmp_path / "int8", tmp_path / "out", write_recipe(tmp_path, text(text_file), method=AWQ))


def test_layers_that_are_not_rescaled_are_named(tmp_path: Path, tiny_gpt2: Path, text_file: Path) -> None:
    method = {**AWQ, "group_size": 16}
    (warning,) = planned(tiny_gpt2, tmp_path / "out", write_recipe(tmp_path, text(text_file), method=method)).warnings
    assert "2 of 8 layers are not rescaled" in warning
    assert "mlp.c_proj" in warning
