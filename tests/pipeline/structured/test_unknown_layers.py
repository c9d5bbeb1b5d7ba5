"""Layers that predict further tokens, which transformers does not know, follow their stack or go with a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.pipeline.families import FAMILIES, TEXT
from tests.pipeline.steps import prune

LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MIXTURE = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


def saved(folder: Path, prefix: str) -> None:
    """A DeepSeek whose last block is there once more, with a projection of its own, under another prefix."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1}
    config = hf.DeepseekV3Config(**{**shape, **heads, **LATENT, **MIXTURE, **TEXT}, num_nextn_predict_layers=1)
    hf.DeepseekV3ForCausalLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    last = "model.layers.3."
    tensors |= {prefix + name.removeprefix(last): t.clone() for name, t in tensors.items() if name.startswith(last)}
    tensors[f"{prefix}eh_proj.weight"] = torch.randn(32, 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def further(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def configuration(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("before", "after"), [("model.layers.4.", "model.layers.3."), ("mtp.layers.0.",) * 2])
def test_they_stay_behind_a_stack_of_fewer_blocks(before: str, after: str, tmp_path: Path) -> None:
    saved(tmp_path / "in", before)
    prune(tmp_path / "in", tmp_path / "out", name="depth", drop=(1,))
    given, kept = further(tmp_path / "in", before), further(tmp_path / "out", after)
    assert "eh_proj.weight" in given
    assert given.keys() == kept.keys()
    assert all(torch.equal(given[name], kept[name]) for name in given)
    config = configuration(tmp_path / "out")
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (3, 1)


WIDTH, EXPERTS = {"name": "width", "multiple": 1}, {"name": "experts", "score": "norm"}


@pytest.mark.parametrize(("prefix", "method"), [("model.layers.4.", WIDTH), ("mtp.layers.0.", EXPERTS)])
def test_they_go_where_they_cannot_be_cut_alike(prefix: str, method: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path / "in", prefix)
    report = prune(tmp_path / "in", tmp_path / "out", sparsity=0.5, **method)
    assert not further(tmp_path / "out", prefix)
    assert configuration(tmp_path / "out")["num_nextn_predict_layers"] == 0
    part = "mtp" if prefix.startswith("mtp") else "model.layers.4"
    (told,) = (line for line in report.warnings if line.startswith(f"{part}: "))
    assert "num_nextn_predict_layers becomes 0" in told


def test_other_tensors_that_the_architecture_lacks_stay(tmp_path: Path) -> None:
    FAMILIES["llama"].saved(tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    prune(tmp_path / "in", tmp_path / "out", name="width", sparsity=0.5, multiple=1)
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in load_file(tmp_path / "out" / "model.safetensors")
