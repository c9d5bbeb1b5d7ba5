from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from safetensors.torch import load_file, save_file

from aicompress.errors import Problems
from aicompress.methods import get
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.structured import planner as structure_planner
from aicompress.recipe import Recipe
from tests.pipeline.families import FAMILIES
from tests.pipeline.steps import refused


def test_refuses_what_it_does_not_understand(tmp_path: Path) -> None:
    FAMILIES["t5"].saved(tmp_path / "t5")
    out = tmp_path / "out"
    assert "2 stacks of blocks: encoder.block, decoder.block" in refused(tmp_path / "t5", out, name="depth", drop=(1,))
    assert "no stack 'encoder'" in refused(tmp_path / "t5", out, name="depth", drop=(1,), stack="encoder")
    assert "d_ff" in refused(tmp_path / "t5", out, name="width", sparsity=0.5, stack="decoder.block")
    assert "blocks are 0 to 3" in refused(tmp_path / "t5", out, name="depth", drop=(4,), stack="encoder.block")
    assert "at least one" in refused(tmp_path / "t5", out, name="depth", drop_layers=4, stack="encoder.block")
    assert "48 neurons" in refused(tmp_path / "t5", out, name="width", intermediate_size=49)
    assert "no feed-forward layer lies in 'x'" in refused(tmp_path / "t5", out, name="width", sparsity=0.5, stack="x")


@pytest.mark.parametrize(
    ("config", "model", "fields", "method", "reason"),
    [
        (hf.BloomConfig, hf.BloomModel, {"n_layer": 2, "n_head": 4}, {"name": "width", "sparsity": 0.5}, "no width"),
        (hf.AlbertConfig, hf.AlbertModel, {"embedding_size": 8}, {"name": "depth", "drop": (0,)}, "share their param"),
        (hf.GPT2Config, hf.GPT2Model, {"scale_attn_by_inverse_layer_idx": True, "n_head": 4, "n_layer": 3},
         {"name": "depth", "drop": (1,)}, "block 2 would compute otherwise as block 1: its attn.scaling"),
        (hf.MambaConfig, hf.MambaModel, {"num_attention_heads": None, "num_hidden_layers": 2, "state_size": 4},
         {"name": "heads", "sparsity": 0.5}, "config.json counts no attention heads"),
        (hf.MiniCPM3Config, hf.MiniCPM3Model, {"num_hidden_layers": 2, "kv_lora_rank": 8, "q_lora_rank": 8,
         "head_dim": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}, {"name": "depth", "drop": (1,)},
         "block 0 would compute otherwise in a stack of 1: its residual_scale would be 1.4, it is 0.98"),
        (hf.ModernBertConfig, hf.ModernBertModel, {"num_hidden_layers": 3, "pad_token_id": 0},
         {"name": "depth", "drop": (0,)}, "block 1 would compute otherwise as block 0: its attn_norm"),
    ],
)  # fmt: skip
def test_refuses_architectures_with_the_reason(
    config: Any, model: Any, fields: dict[str, Any], method: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model(config(**{**shape, **fields})).save_pretrained(tmp_path / "in")
    assert reason in refused(tmp_path / "in", tmp_path / "out", **method)


def test_refuses_unknown_architectures_and_bare_files(tmp_path: Path) -> None:
    FAMILIES["llama"].saved(tmp_path / "in")
    config = tmp_path / "in" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["LlamaForSomethingElse"]}))
    assert "does not know" in refused(tmp_path / "in", tmp_path / "out", name="width", sparsity=0.5)
    bare = tmp_path / "in" / "model.safetensors"
    assert "bare" in refused(bare, tmp_path / "out.safetensors", name="depth", drop=(0,))


def test_refuses_rules_and_select(tmp_path: Path) -> None:
    FAMILIES["llama"].saved(tmp_path / "in")
    config = get("prune", "width").config(name="width", sparsity=0.5)
    recipe = Recipe(version=1, method=config, select={"include": ["*.mlp.*"]}, rules=[{"match": "*", "skip": True}])
    with pytest.raises(Problems) as found:
        structure_planner.make_plan(tmp_path / "in", Destination(tmp_path / "out"), recipe, "prune")
    assert [error.message.split(":")[0] for error in found.value.problems] == ["rules", "select"]


def test_refuses_a_checkpoint_that_is_not_its_configuration(tmp_path: Path) -> None:
    FAMILIES["llama"].saved(tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:40].clone()}, tmp_path / "in" / "model.safetensors")
    message = refused(tmp_path / "in", tmp_path / "out", name="width", sparsity=0.5)
    assert f"{name} is [40, 32], config.json says [48, 32]" in message
    del tensors[name]
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    assert f"{name} is missing" in refused(tmp_path / "in", tmp_path / "out", name="width", sparsity=0.5)
