"""Neurons where config.json or the tensors hold them in a way of their own: what is written computes as the model with
those neurons silent; what cannot be said is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.naming import layer_name
from tests.pipeline.families import GQA, SHAPE, TEXT
from tests.pipeline.steps import loaded, plan, prune, refused

SMALL = {**SHAPE, **TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2}
MIXED = {**SMALL, "num_local_experts": 3, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Case:
    """A model, and where its neurons are read.

    Attributes:
        build: makes it.
        readers: attribute paths of the parameters that read neurons, their axis of neurons counted from behind, and how
            many experts lie one after the other on it.
        left: widths that config.json has afterwards.
    """

    build: Callable[[], Any]
    readers: dict[str, tuple[int, int]]
    left: dict[str, Any]


def gpt_oss() -> Any:
    return hf.GptOssForCausalLM(hf.GptOssConfig(**MIXED, head_dim=8))


def granite() -> Any:
    return hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**MIXED))


def llama4() -> Any:
    """A block with experts behind one without, whose width has a field of its own."""
    sizes = {"intermediate_size_mlp": 40, "interleave_moe_layer_step": 2}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**{**MIXED, "num_experts_per_tok": 1}, head_dim=8, **sizes))


def dbrx() -> Any:
    experts = {"ffn_hidden_size": 48, "moe_num_experts": 3, "moe_top_k": 2}
    heads = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}
    shape = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32, "vocab_size": 64}
    return hf.DbrxForCausalLM(hf.DbrxConfig(**shape, attn_config=heads, ffn_config=experts, initializer_range=0.3))


def lfm2() -> Any:
    """A width that the architecture takes two thirds of, in eights."""
    return hf.Lfm2ForCausalLM(hf.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], block_multiple_of=8))


def gemma3n() -> Any:
    own = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "num_kv_shared_layers": 0}
    lists = {"intermediate_size": [48, 64], "activation_sparsity_pattern": [0.0, 0.0]}
    return hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**{**SMALL, **GQA, **own, **kinds, **lists}))


def zamba2() -> Any:
    """Blocks that share one feed-forward layer, to which each adds an adapter of its own."""
    mamba = {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "num_mem_blocks": 1, "chunk_size": 8}
    kinds = {"layers_block_type": ["mamba", "hybrid", "hybrid"], "hybrid_layer_ids": [1, 2], "num_hidden_layers": 3}
    return hf.Zamba2ForCausalLM(hf.Zamba2Config(**{**SMALL, "num_key_value_heads": 4, **mamba, **kinds}))


CASES = {
    "experts, gate and up in turns": Case(
        gpt_oss, {f"model.layers.{n}.mlp.experts.down_proj": (-2, 1) for n in (0, 1)}, {"intermediate_size": 24}
    ),
    "experts of another name on disk": Case(
        granite,
        {f"model.layers.{n}.block_sparse_moe.experts.down_proj": (-1, 1) for n in (0, 1)},
        {"intermediate_size": 24},
    ),
    "experts beside others": Case(
        llama4,
        {
            "model.layers.0.feed_forward.down_proj.weight": (-1, 1),
            "model.layers.1.feed_forward.experts.down_proj": (-2, 1),
            "model.layers.1.feed_forward.shared_expert.down_proj.weight": (-1, 1),
        },
        {"intermediate_size": 24, "intermediate_size_mlp": 24},
    ),
    "experts on one axis": Case(dbrx, {f"transformer.blocks.{n}.ffn.experts.mlp.w2": (-2, 3) for n in (0, 1)}, {}),
    "a width that is worked out": Case(
        lfm2,
        {f"model.layers.{n}.feed_forward.w2.weight": (-1, 1) for n in (0, 1)},
        {"intermediate_size": 16, "block_auto_adjust_ff_dim": False},
    ),
    "a width for each block": Case(
        gemma3n,
        {f"model.layers.{n}.mlp.down_proj.weight": (-1, 1) for n in (0, 1)},
        {"intermediate_size": [24, 32]},
    ),
    "blocks that share a layer": Case(
        zamba2, {"model.layers.1.shared_transformer.feed_forward.down_proj.weight": (-1, 1)}, {"intermediate_size": 24}
    ),
}


def silence(whole: Tensor, left: Tensor, axis: int, runs: int) -> None:
    """Take neurons out of what reads them that the narrow model lacks; those of every expert are its own."""
    wide, few = (each.detach().movedim(axis, -1) for each in (whole, left))
    if runs > 1:
        wide, few = (each.unflatten(-1, (runs, -1)).movedim(-2, 0) for each in (wide, few))
    if whole.ndim == 2 and runs == 1:
        wide, few = wide[None], few[None]
    assert len(wide) == len(few)
    for columns, stay in zip(wide, few, strict=True):
        same = (columns[:, :, None] == stay[:, None, :]).all(dim=0)  # (neurons, neurons that stay)
        assert same.sum(dim=0).tolist() == [1] * stay.shape[1]
        columns[:, ~same.any(dim=1)] = 0


def cut_layers(folder: Path) -> set[str]:
    """Names of the matrices that a step has made smaller."""
    before, after = (Checkpoint.open(folder / name).parameters() for name in ("in", "out"))
    cut = {name for name, spec in before.items() if after[name].shape != spec.shape and len(spec.shape) > 1}
    return {layer_name(name) for name in cut if not name.endswith("bias")}


def outputs(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.arange(3, 35).reshape(2, 16), use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", CASES)
def test_neurons_are_the_model_with_those_silent(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().eval()
    model.save_pretrained(tmp_path / "in")
    before = outputs(model)
    report = prune(tmp_path / "in", tmp_path / "out", name="width", sparsity=0.5)
    assert not any("not tried" in warning for warning in report.warnings)
    assert {row.name for row in report.layers if "neurons" in row.detail} == cut_layers(tmp_path)
    narrow = loaded(model, tmp_path / "out")
    config = narrow.config.to_dict()
    assert {field: config[field] for field in case.left} == case.left
    for path, where in case.readers.items():
        silence(attrgetter(path)(model), attrgetter(path)(narrow), *where)
    after = outputs(narrow)
    torch.testing.assert_close(after, outputs(model), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


def test_scores_of_merged_experts_by_hand(tmp_path: Path) -> None:
    """Every expert keeps its neurons of the largest product of norms: gate, up, their biases, and down."""
    torch.manual_seed(0)
    model = gpt_oss().eval()
    model.save_pretrained(tmp_path / "in")
    made = plan(tmp_path / "in", tmp_path / "out", name="width", intermediate_size=8)
    structure = made.edit.structures[0]
    experts = model.model.layers[0].mlp.experts
    gate_up = torch.cat([experts.gate_up_proj, experts.gate_up_proj_bias[:, None]], dim=1)  # (experts, in, 2 neurons)
    norms = gate_up[:, :, ::2].norm(dim=1) * gate_up[:, :, 1::2].norm(dim=1) * experts.down_proj.norm(dim=2)
    kept = made.choice.pruner.keep(structure, made.edit.sizes[0])
    assert [unit // 48 for unit in kept] == [expert for expert in range(3) for _ in range(8)]
    for expert in range(3):
        best = set((48 * expert + norms[expert].topk(8).indices).tolist())
        assert best == {unit for unit in kept if unit // 48 == expert}


def test_what_merged_experts_cannot(tmp_path: Path) -> None:
    gpt_oss().save_pretrained(tmp_path / "in")
    for score in ("taylor", "obs"):
        message = refused(tmp_path / "in", tmp_path / "out", name="width", sparsity=0.5, score=score)
        assert "model.layers.0.mlp.experts: one tensor holds all experts, whose neurons cannot be chosen" in message
    assert "one width" in refused(tmp_path / "in", tmp_path / "out", name="width", sparsity=0.5, widths="per_layer")
    assert "has 48 neurons" in refused(tmp_path / "in", tmp_path / "out", name="width", intermediate_size=50)
