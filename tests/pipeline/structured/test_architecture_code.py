"""What an architecture's own code raises while a cut is planned is a refusal in words, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from tests.pipeline.families import SHAPE, TEXT
from tests.pipeline.steps import refused

HEADS: dict[str, Any] = {"name": "heads", "unit": "group", "sparsity": 0.5}
SMALL = {**SHAPE, "num_hidden_layers": 2, **TEXT}


def siglip() -> Any:
    """The pooling head is torch's own attention, whose number of heads nothing can change."""
    vision = {**SHAPE, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    return hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=vision, num_labels=2))


def rwkv() -> Any:
    """Initial values follow from a block's place, divided by the number of the other blocks."""
    return hf.RwkvForCausalLM(hf.RwkvConfig(hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, **TEXT))


def olmo_hybrid() -> Any:
    """One kind of blocks must not be missing."""
    heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    kinds = {"layer_types": ["full_attention", "linear_attention", "linear_attention"], "num_hidden_layers": 3}
    kinds |= {"num_key_value_heads": 4, "pad_token_id": 0}
    return hf.OlmoHybridForCausalLM(hf.OlmoHybridConfig(**{**SMALL, **heads, **kinds, "linear_value_head_dim": 8}))


def diff_llama() -> Any:
    """Key-value heads come in pairs."""
    return hf.DiffLlamaForCausalLM(hf.DiffLlamaConfig(**{**SMALL, "num_key_value_heads": 2, "num_hidden_layers": 1}))


def xlnet() -> Any:
    """The size of a head must be the share of the hidden width, which no probe changes alone."""
    return hf.XLNetLMHeadModel(hf.XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=32, vocab_size=64))


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "siglip": (siglip, HEADS, "head.attention.in_proj_weight is no weight of a layer"),
    "rwkv": (rwkv, {"name": "depth", "keep_layers": 1}, "RwkvForCausalLM does not load it: division by zero | this"),
    "olmo-hybrid": (
        olmo_hybrid,
        {"name": "depth", "keep_layers": 1},
        "transformers makes no model of 1 of the 3 blocks of model.layers: OLMoHybrid expects",
    ),
    "diff-llama": (diff_llama, HEADS, "transformers makes no model of 2 heads an attention: DiffLlama requires"),
    "xlnet": (xlnet, HEADS, "config.json cannot say fewer heads: their size follows from their number (transformers"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_it_raises_is_a_refusal(name: str, tmp_path: Path) -> None:
    make, method, reason = CASES[name]
    make().save_pretrained(tmp_path / "in")
    message = refused(tmp_path / "in", tmp_path / "out", **method)
    assert reason in message
    assert "\n" not in message
