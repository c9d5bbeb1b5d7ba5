"""Attention heads: what is written computes as the model with those heads silent; what cannot be said is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.pipeline.calibration.steps import text
from tests.pipeline.families import FAMILIES, GQA, SHAPE, TEXT, decoder, gemma3n
from tests.pipeline.steps import loaded, plan, prune, refused
from tests.pipeline.structured.test_calibrated import divergence, recipe, windows
from tests.pipeline.structured.test_calibrated import prune as calibrated
from tests.pipeline.structured.units.test_neurons import zamba2

BIASED = decoder(hf.LlamaForCausalLM, hf.LlamaConfig, **GQA, attention_bias=True)
ALL = decoder(hf.LlamaForCausalLM, hf.LlamaConfig)
PHI3 = decoder(hf.Phi3ForCausalLM, hf.Phi3Config, num_key_value_heads=2)
DECODERS = {name: FAMILIES[name] for name in ("llama", "llama-tied", "qwen3", "gemma", "gemma3")}
DECODERS |= {"biased": BIASED, "multi-head": ALL, "phi3": PHI3}


def silence(model: Any, narrow: Any, unit: str) -> list[list[int]]:
    """Silence heads of a model by hand that a narrow one does not have; returns the units that stay by layer."""
    config, size, found = model.config, 8, []
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    for before, after in zip(model.model.layers, narrow.model.layers, strict=True):
        wide, few = before.self_attn, after.self_attn
        name, step = ("k_proj", size) if unit == "group" else ("q_proj", size)
        if hasattr(wide, "qkv_proj"):
            begin = heads * size
            rows = wide.qkv_proj.weight[begin : begin + groups * size]
            left = few.qkv_proj.weight[narrow.config.num_attention_heads * size :][: few.config.num_key_value_heads * 8]
        else:
            rows, left = getattr(wide, name).weight, getattr(few, name).weight
        kept = [int((rows[::step] == row).all(dim=1).nonzero()) for row in left[::step]]
        columns = size * (heads // groups if unit == "group" else 1)
        gone = torch.ones(wide.o_proj.weight.shape[1], dtype=torch.bool)
        for each in kept:
            gone[each * columns : (each + 1) * columns] = False
        with torch.no_grad():
            wide.o_proj.weight[:, gone] = 0
        found.append(kept)
    return found


@pytest.mark.parametrize("unit", ["group", "query"])
@pytest.mark.parametrize("name", DECODERS)
def test_heads_are_the_model_with_those_heads_silent(name: str, unit: str, tmp_path: Path) -> None:
    family = DECODERS[name]
    model = family.saved(tmp_path / "in")
    before = family.output(model)
    if (name, unit) in (("multi-head", "query"), ("phi3", "query")):
        return  # a group is a head there; Phi-3's queries are told from its groups
    report = prune(tmp_path / "in", tmp_path / "out", name="heads", sparsity=0.5, unit=unit)
    narrow = loaded(model, tmp_path / "out")
    assert narrow.config.num_attention_heads == 2
    assert narrow.config.head_dim == 8
    assert narrow.config.num_key_value_heads == (2 if unit == "query" or name == "multi-head" else 1)
    kept = silence(model, narrow, unit)
    if unit == "query":
        assert all(one // 2 == 0 and other // 2 == 1 for one, other in kept)  # one of each group
    after = family.output(narrow)
    torch.testing.assert_close(after, family.output(model), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)
    assert {row.detail["heads"] for row in report.layers if "heads" in row.detail} == {"2 of 4"}
    assert report.after.bytes < report.before.bytes


@pytest.mark.parametrize(("blocks", "shared"), [(4, 0), (6, 3)])
def test_a_block_that_borrows_keys_keeps_the_groups_of_its_lender(blocks: int, shared: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gemma3n(blocks, shared).eval()
    model.save_pretrained(tmp_path / "in")
    prune(tmp_path / "in", tmp_path / "out", name="heads", sparsity=0.5)
    narrow = loaded(model, tmp_path / "out")
    for before, after in zip(model.model.layers, narrow.model.layers, strict=True):
        wide, few = before.self_attn, after.self_attn
        rows, left = wide.q_proj.weight.view(2, -1), few.q_proj.weight.view(1, -1)
        (kept,) = (rows == left).all(dim=1).nonzero()[:, 0].tolist()
        with torch.no_grad():
            wide.o_proj.weight.view(32, 2, 16)[:, 1 - kept] = 0
    family = FAMILIES["gemma3"]
    torch.testing.assert_close(family.output(narrow), family.output(model), atol=1e-5, rtol=1e-4)


def test_blocks_that_share_an_attention_are_one(tmp_path: Path) -> None:
    """The checkpoint has it once; a small model of the architecture computes as the plan says."""
    zamba2().save_pretrained(tmp_path / "in")
    planned = plan(tmp_path / "in", tmp_path / "out", name="heads", sparsity=0.5)
    assert [
        (structure.size, size) for structure, size in zip(planned.edit.structures, planned.edit.sizes, strict=True)
    ] == [(4, 2)]
    assert (planned.edit.config or {})["num_attention_heads"] == 2
    assert not any("not tried" in warning for warning in planned.warnings)


def test_statistics_of_blocks_that_share_keys_are_refused(tmp_path: Path, text_file: Path) -> None:
    gemma3n(4, 1).save_pretrained(tmp_path / "in")
    message = refused(tmp_path / "in", tmp_path / "out", name="heads", sparsity=0.5, score="obs")
    assert "layers.1.self_attn.o_proj and model.layers.3.self_attn.o_proj share keys" in message


def test_scores_by_hand(tmp_path: Path) -> None:
    """The product of the norms of q, k, v rows and o columns of a group."""
    family = FAMILIES["llama"]
    model = family.saved(tmp_path / "in")
    prune(tmp_path / "in", tmp_path / "out", name="heads", heads=2)
    kept = silence(model, loaded(model, tmp_path / "out"), "group")
    torch.manual_seed(0)
    for layer, (stays,) in zip(family.build().eval().model.layers, kept, strict=True):
        attention = layer.self_attn
        q, k, v = (getattr(attention, f"{n}_proj").weight.view(2, -1).norm(dim=1) for n in "qkv")
        o = attention.o_proj.weight.t().reshape(2, -1).norm(dim=1)
        assert int((q * k * v * o).argmax()) == stays


@pytest.mark.parametrize("unit", ["group", "query"])
def test_obs_takes_over_what_heads_did(tmp_path: Path, trained_llama: Path, text_file: Path, unit: str) -> None:
    ids, found = windows(trained_llama, text_file, 16), {}
    for score in ("product", "obs"):
        method = {"name": "heads", "heads": 2, "unit": unit, "score": score}
        calibrated(trained_llama, tmp_path / score, recipe(tmp_path, text(text_file, 32), method))
        found[score] = divergence(trained_llama, tmp_path / score, ids)
    assert found["obs"] < 0.7 * found["product"]


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        (hf.Olmo2ForCausalLM, hf.Olmo2Config, "q_norm.weight works over all heads together"),
        (hf.OlmoeForCausalLM, hf.OlmoeConfig, "does not compute as with these silent"),  # its norm has the hidden width
    ],
)
def test_norms_over_all_heads_are_refused(model: Any, config: Any, reason: str, tmp_path: Path) -> None:
    small = {**SHAPE, **TEXT, "num_hidden_layers": 1, "num_experts": 2, "num_experts_per_tok": 1}
    model(config(**small)).save_pretrained(tmp_path / "in")
    assert reason in refused(tmp_path / "in", tmp_path / "out", name="heads", sparsity=0.5)


def test_numbers_that_transformers_does_not_take_are_refused_with_those_that_fit(tmp_path: Path) -> None:
    ALL.saved(tmp_path / "in")
    message = refused(tmp_path / "in", tmp_path / "out", name="heads", heads=3)
    assert "multiple" in message or "divisible" in message
    assert "these numbers of heads fit: 1, 2" in message
    FAMILIES["llama"].saved(tmp_path / "gqa")
    assert "can keep 2, 4 heads" in refused(tmp_path / "gqa", tmp_path / "out", name="heads", heads=3)


def test_a_share_that_whole_groups_cannot_have_is_told(tmp_path: Path) -> None:
    FAMILIES["llama"].saved(tmp_path / "in")
    coarse, exact = (plan(tmp_path / "in", tmp_path / "out", name="heads", sparsity=share) for share in (0.9, 0.5))
    assert coarse.notes == ("50% of the heads stay, where 10% was asked for",)
    assert exact.notes == ()


def test_nothing_and_too_much(tmp_path: Path) -> None:
    FAMILIES["llama"].saved(tmp_path / "in")
    planned = plan(tmp_path / "in", tmp_path / "out", name="heads", sparsity=0.2)
    assert any("rounds to all of them" in line for line in planned.warnings)
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    assert (planned.output.config or {})["num_attention_heads"] == config["num_attention_heads"]
    assert "can keep 2, 4 heads" in refused(tmp_path / "in", tmp_path / "out", name="heads", heads=8)
