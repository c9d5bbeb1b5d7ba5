"""Architectures whose own code reads a layer's weight: what is stored still loads, and runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import aicompress
from aicompress import recipe as recipes
from aicompress.model.loading.definitions.definition import skeleton
from aicompress.model.loading.weight_reads import reads_weights, weights_used
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination

IDS = torch.arange(3, 19)[None]


def mamba() -> Any:
    return hf.MambaForCausalLM(hf.MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=64))


def modernbert() -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    return hf.ModernBertForMaskedLM(hf.ModernBertConfig(**shape, **special, vocab_size=64))


def t5() -> Any:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(**shape, vocab_size=64, decoder_start_token_id=0))


def logits(model: Any) -> Tensor:
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        found: Tensor = model(input_ids=IDS, **extra).logits
    return found


@pytest.mark.parametrize("build", [mamba, modernbert, t5])
@pytest.mark.parametrize("preset", ["rtn-w8", "w8a8"])
def test_quantized_it_loads_and_runs_everywhere(tmp_path: Path, build: Callable[[], Any], preset: str) -> None:
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(tmp_path / "model")
    recipe = recipes.load(f"quantize/{preset}", "quantize")
    planned = planner.make_plan(tmp_path / "model", Destination(tmp_path / "out"), recipe, "quantize")
    layerwise.run(planned, Options(latency="off"))
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored.get("dequantize") or stored["quant_method"] == "aicompress"
    original = logits(model)
    running = [aicompress.load(tmp_path / "out", kernels=kernels) for kernels in ("fast", "reference")]  # type: ignore[arg-type]
    for each in (*running, type(model).from_pretrained(tmp_path / "out").eval()):
        assert (logits(each) - original).norm() < 0.1 * original.norm()


def test_usual_architectures_read_none_of_their_weights() -> None:
    config = json.loads(hf.LlamaConfig(num_hidden_layers=1, architectures=["LlamaForCausalLM"]).to_json_string())
    model = skeleton(config)
    assert not weights_used(model)
    names = [n for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    assert not reads_weights(model, names)


def test_an_architecture_that_initializes_packed_layers_reads_them() -> None:
    """compressed-tensors does not tell transformers that a layer is initialized: xLSTM's code asks for its weight."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "vocab_size": 64}
    config = json.loads(hf.xLSTMConfig(**shape, architectures=["xLSTMForCausalLM"]).to_json_string())
    model = skeleton(config)
    assert reads_weights(model, [n for n, p in model.named_parameters() if p.ndim == 2 and "blocks" in n])
