from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from aicompress.checkpoint import Checkpoint
from aicompress.model.architecture.architecture import Architecture, keep_blocks
from aicompress.model.architecture.feed_forward import feed_forwards
from aicompress.model.architecture.shapes import build, misfits, shapes_of
from aicompress.weights import TensorSpec

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def architecture(model: Any, folder: Path) -> Architecture:
    model.save_pretrained(folder)
    opened = Checkpoint.open(folder)
    return Architecture.of(opened.config, opened.parameters())


def test_llama(tmp_path: Path) -> None:
    config = hf.LlamaConfig(**SHAPE, num_key_value_heads=2, num_hidden_layers=3, mlp_bias=True)
    found = architecture(hf.LlamaForCausalLM(config), tmp_path)
    (stack,) = found.stacks()
    assert (stack.name, stack.size, stack.field) == ("model.layers", 3, ("num_hidden_layers",))
    assert stack.block_of("model.layers.2.mlp.up_proj.weight") == 2
    assert stack.block_of("model.norm.weight") is None
    assert stack.renumbered("model.layers.2.mlp.up_proj.weight", 11) == "model.layers.11.mlp.up_proj.weight"
    layers = feed_forwards(found)
    assert [layer.name for layer in layers] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    couplings = {(c.tensor.removeprefix("model.layers.1.mlp."), c.axis, c.parts, c.role) for c in layers[1].couplings}
    assert couplings == {
        ("gate_proj.weight", 0, 1, "producer"),
        ("gate_proj.bias", 0, 1, "producer"),
        ("up_proj.weight", 0, 1, "producer"),
        ("up_proj.bias", 0, 1, "producer"),
        ("down_proj.weight", 1, 1, "consumer"),
    }


def test_a_width_that_config_leaves_open(tmp_path: Path) -> None:
    """GPT-2's n_inner is null: four times the hidden size; its matrices are stored (in, out)."""
    found = architecture(hf.GPT2Model(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)), tmp_path)
    layer = feed_forwards(found)[1]
    assert (layer.width, layer.field) == (128, ("n_inner",))
    assert {(c.tensor, c.axis, c.role) for c in layer.couplings} == {
        ("h.1.mlp.c_fc.weight", 1, "producer"),
        ("h.1.mlp.c_fc.bias", 0, "producer"),
        ("h.1.mlp.c_proj.weight", 0, "consumer"),
    }


def test_a_prefix_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    model = hf.BertForMaskedLM(hf.BertConfig(**SHAPE, num_hidden_layers=2))
    plain = architecture(model, tmp_path)
    specs = {name.removeprefix("bert."): spec for name, spec in plain.specs.items()}
    assert [stack.name for stack in Architecture(plain.config, specs).stacks()] == ["encoder.layer"]


@pytest.mark.parametrize(
    ("model", "config", "fields", "width", "field", "count"),
    [
        (hf.MixtralForCausalLM, hf.MixtralConfig, {"num_local_experts": 3}, 48, "intermediate_size", 6),
        (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, {"num_experts": 2, "moe_intermediate_size": 16, "head_dim": 8},
         16, "moe_intermediate_size", 4),
    ],
)  # fmt: skip
def test_every_expert_has_neurons_of_its_own(
    model: Any, config: Any, fields: dict[str, Any], width: int, field: str, count: int, tmp_path: Path
) -> None:
    found = architecture(model(config(**SHAPE, num_hidden_layers=2, num_key_value_heads=2, **fields)), tmp_path)
    layers = feed_forwards(found)
    assert len(layers) == count
    assert {(layer.width, layer.field) for layer in layers} == {(width, (field,))}
    assert all(len(layer.couplings) == 3 for layer in layers)


def test_nested_configurations(tmp_path: Path) -> None:
    side = {key: value for key, value in SHAPE.items() if key != "vocab_size"}
    text = {**SHAPE, "num_hidden_layers": 2}
    vision = {**side, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
    found = architecture(hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision)), tmp_path)
    assert {(stack.name, stack.size, stack.field) for stack in found.stacks()} == {
        ("text_model.encoder.layers", 2, ("text_config", "num_hidden_layers")),
        ("vision_model.encoder.layers", 3, ("vision_config", "num_hidden_layers")),
    }


def test_shared_blocks_are_no_stack(tmp_path: Path) -> None:
    assert architecture(hf.AlbertModel(hf.AlbertConfig(**SHAPE, embedding_size=16)), tmp_path).stacks() == []


def test_keep_blocks_edits_everything_that_counts_blocks() -> None:
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "no_rope_layers": [1, 1, 1, 0],
        "mlp_only_layers": [1, 3],
        "first_k_dense_replace": 2,
        "max_window_layers": 28,
        "mrope_section": [1, 2, 3, 4],
        "per_layer_config": {"1": {"head_dim": 8}, "3": {"head_dim": 16}},
    }
    assert keep_blocks(config, ("num_hidden_layers",), [0, 3]) == {
        "num_hidden_layers": 2,
        "layer_types": ["a", "d"],
        "no_rope_layers": [1, 0],
        "mlp_only_layers": [1],
        "first_k_dense_replace": 1,
        "max_window_layers": 28,
        "mrope_section": [1, 2, 3, 4],
        "per_layer_config": {"1": {"head_dim": 16}},
    }
    assert len(config["layer_types"]) == 4  # type: ignore[arg-type]


def test_a_backbone_names_a_stage_for_every_block(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    found = architecture(hf.Dinov2Model(hf.Dinov2Config(**shape, num_hidden_layers=3)), tmp_path)
    (stack,) = found.stacks()
    edited = keep_blocks(found.config, stack.field, [0, 2])
    assert build(edited).config.stage_names == ["stem", "stage1", "stage2"]


def test_misfits_name_what_is_wrong() -> None:
    config = hf.BertConfig(**SHAPE, num_hidden_layers=2, architectures=["BertModel"]).to_dict()
    specs = {name: TensorSpec(torch.float32, shape) for name, shape in shapes_of(config).items()}
    assert misfits(config, specs) == set()
    del specs["encoder.layer.0.output.dense.bias"]
    specs["encoder.layer.1.output.dense.weight"] = TensorSpec(torch.float32, (32, 47))
    specs["encoder.layer.2.output.dense.bias"] = TensorSpec(torch.float32, (32,))
    assert misfits(config, specs) == {
        "missing encoder.layer.0.output.dense.bias",
        "unexpected encoder.layer.2.output.dense.bias",
        "encoder.layer.1.output.dense.weight has shape (32, 47) where (32, 48) is expected",
    }
