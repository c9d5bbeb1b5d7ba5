"""What a tiny model of an architecture is run on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aicompress.errors import CheckpointError
from aicompress.model.loading.definitions.definition import refusing

HINT = "prune its heads, feed-forward neurons or layers instead"
ANY_SIZE = 64  # of images that a model takes whatever their size is
SAMPLES, FRAMES = 4000, 32  # of sound
BANDS = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins")  # numbers of a frame of sound


def inputs_of(model: Any) -> dict[str, Tensor]:
    """A few random tokens, an image, both, pictures of a video, or sound.

    Raises:
        CheckpointError: the model reads something else.
    """
    with refusing("what a small model reads cannot be told", HINT):
        return _inputs_of(model)


def _inputs_of(model: Any) -> dict[str, Tensor]:
    config, taken = model.config.to_dict(), model.main_input_name
    vision = config.get("vision_config")
    if taken == "pixel_values":
        shape = _image_shape(vision if isinstance(vision, dict) else config)
        return {taken: _random(shape if "num_frames" not in config else (1, config["num_frames"], *shape[1:]))}
    if taken in ("input_features", "input_values"):
        sound = {taken: _random(_sound_shape(config, taken))}
        if not model.config.is_encoder_decoder:  # an encoder of sound alone has no vocabulary
            return sound
        return {**sound, "decoder_input_ids": _tokens(config["vocab_size"], (1, 6))}
    if taken != "input_ids":
        raise CheckpointError(f"a small model that reads {taken} cannot be tried out", HINT)
    vocabulary = model.config.get_text_config().to_dict().get("vocab_size")
    if not isinstance(vocabulary, int):
        raise CheckpointError("a small model without a vocabulary cannot be tried out", HINT)
    ids = _tokens(vocabulary, (2, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if isinstance(vision, dict) and not model.can_generate():  # what generates runs on tokens alone
        inputs["pixel_values"] = _random(_image_shape(vision)).expand(len(ids), -1, -1, -1)
    return {**inputs, "decoder_input_ids": ids} if model.config.is_encoder_decoder else inputs


def _tokens(vocabulary: int, shape: tuple[int, int]) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _image_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """(1, channels, height, width); where nothing says how large an image is, the model may take any."""
    sections = (config, config.get("backbone_config") or {})
    sizes = [section[key] for section in sections for key in ("image_size", "img_size") if section.get(key)]
    size = sizes[0] if sizes else ANY_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return 1, config.get("num_channels", 3), height, width


def _sound_shape(config: Mapping[str, Any], taken: str) -> tuple[int, ...]:
    """Samples (1, samples), of several channels (1, channels, samples), or frames (1, frames, numbers).

    Raises:
        CheckpointError: nothing says how many numbers a frame has.
    """
    if taken == "input_features" and {"num_mel_bins", "max_source_positions"} <= config.keys():
        return 1, config["num_mel_bins"], 2 * config["max_source_positions"]
    if taken == "input_values" and "num_mel_bins" not in config:
        return (1, config["audio_channels"], SAMPLES) if "audio_channels" in config else (1, SAMPLES)
    bands = next((config[key] for key in BANDS if isinstance(config.get(key), int)), None)
    if bands is None:
        raise CheckpointError(f"a small model that reads {taken} cannot be tried out", HINT)
    return 1, config.get("max_length", FRAMES) if taken == "input_values" else FRAMES, bands
