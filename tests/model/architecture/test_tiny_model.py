"""A small model runs on inputs that its configuration asks for."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from aicompress.errors import CheckpointError
from aicompress.model.architecture import tiny_model


def test_an_encoder_of_sound_without_a_vocabulary_runs_on_frames() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    config = hf.Qwen2AudioEncoderConfig(**sizes, num_mel_bins=8, max_source_positions=16)
    model = tiny_model.in_memory(hf.Qwen2AudioEncoder(config))
    inputs = tiny_model.inputs_of(model)
    assert list(inputs) == ["input_features"]
    assert tiny_model.outputs_of(model, inputs)[0].shape == (1, 8, 16)


def test_a_model_that_gives_nan_says_nothing() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tiny_model.in_memory(hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=32)))
    model.lm_head.weight[3] = torch.nan
    with pytest.raises(CheckpointError, match="gives NaN"):
        tiny_model.outputs_of(model, tiny_model.inputs_of(model))
