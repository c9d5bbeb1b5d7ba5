"""A small model runs on inputs that its configuration asks for."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from aicompress.errors import CheckpointError
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.hidden_width import residual, small
from aicompress.model.architecture.shapes import build, misfits
from aicompress.model.architecture.small_models import tiny_model
from aicompress.model.architecture.small_models.reduced_model import with_short_windows
from aicompress.model.architecture.small_models.tiny_inputs import inputs_of
from aicompress.weights import TensorSpec


def test_an_encoder_of_sound_without_a_vocabulary_runs_on_frames() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    config = hf.Qwen2AudioEncoderConfig(**sizes, num_mel_bins=8, max_source_positions=16)
    model = tiny_model.in_memory(hf.Qwen2AudioEncoder(config))
    inputs = inputs_of(model)
    assert list(inputs) == ["input_features"]
    assert tiny_model.outputs_of(model, inputs)[0].shape == (1, 8, 16)


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CONVOLVED = {"conv_dim": [8], "conv_stride": [40], "conv_kernel": [80], "num_feat_extract_layers": 1}
SEEN = {
    "an image of any size": (hf.ResNetModel, hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
    "pictures of a video": (hf.VideoMAEModel, hf.VideoMAEConfig(**SMALL, image_size=16, num_frames=2, patch_size=8)),
    "a spectrogram": (hf.ASTModel, hf.ASTConfig(**SMALL, max_length=32, num_mel_bins=16)),
    "samples of sound": (
        hf.Wav2Vec2Model,
        hf.Wav2Vec2Config(**SMALL, **CONVOLVED, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2),
    ),
    "frames of sound": (
        hf.Wav2Vec2BertModel,
        hf.Wav2Vec2BertConfig(**SMALL, feature_projection_input_dim=12, add_adapter=False),
    ),
}


@pytest.mark.parametrize("what", SEEN)
def test_a_model_without_tokens_runs_on(what: str) -> None:
    kind, config = SEEN[what]
    model = tiny_model.in_memory(kind(config))
    assert tiny_model.outputs_of(model, inputs_of(model))


def test_a_model_that_gives_nan_says_nothing() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tiny_model.in_memory(hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=32)))
    model.lm_head.weight[3] = torch.nan
    with pytest.raises(CheckpointError, match="gives NaN"):
        tiny_model.outputs_of(model, inputs_of(model))


def test_a_short_input_is_padded_to_little_and_no_more_of_a_head_is_rotated_than_there_is() -> None:
    pegasus = hf.PegasusXConfig(d_model=64, encoder_layers=2, decoder_layers=2).to_dict()
    assert with_short_windows({**pegasus, "architectures": ["PegasusXModel"]})["block_size"] == 8
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 1, "vocab_size": 64, "rotary_dim": 12}
    config = hf.GPTJConfig(**sizes, architectures=["GPTJForCausalLM"]).to_dict()
    model = tiny_model.in_memory(build(small(config, ("n_embd",), 32)))
    assert model.config.rotary_dim == 4
    tiny_model.outputs_of(model, inputs_of(model))


def test_matrices_of_one_module_are_taken_for_one_kind_where_there_are_many() -> None:
    """Longformer has three projections more in each attention, for tokens that all others attend to."""
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = hf.LongformerForMaskedLM(hf.LongformerConfig(**sizes, vocab_size=32, attention_window=8))
    architecture = Architecture.of(
        model.config.to_dict(), {name: TensorSpec(each.dtype, each.shape) for name, each in model.state_dict().items()}
    )
    inner = {coupling.tensor for coupling in residual(architecture, "sections").inner}
    attention = "longformer.encoder.layer.0.attention"
    assert f"{attention}.self.query_global.weight" in inner
    assert f"{attention}.output.dense.weight" in inner


def test_an_architecture_with_a_loader_of_its_own_is_looked_at() -> None:
    """That of Qwen2.5-Omni asks for a file of speakers, and tells nothing of missing tensors."""
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": 16}
    thinker = {"text_config": text, "vision_config": vision, "audio_config": audio}
    config = hf.Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    written = {**config.to_dict(), "architectures": ["Qwen2_5OmniForConditionalGeneration"]}
    specs = {name: TensorSpec.of(tensor) for name, tensor in build(written).state_dict().items()}
    assert misfits(written, specs) == set()
    lost = next(iter(specs))
    assert f"missing {lost}" in misfits(written, {name: spec for name, spec in specs.items() if name != lost})
