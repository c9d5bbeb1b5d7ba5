"""What a tiny model of an architecture is run on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aicompress.errors import CheckpointError
from aicompress.model.loading.architecture_code import refusing

HINT = "prune its heads, feed-forward neurons or layers instead"


def inputs_of(model: Any) -> dict[str, Tensor]:
    """A few random tokens, an image, both, or frames of sound.

    Raises:
        CheckpointError: the model reads something else.
    """
    with refusing("what a small model reads cannot be told", HINT):
        return _inputs_of(model)


def _inputs_of(model: Any) -> dict[str, Tensor]:
    config, taken = model.config.to_dict(), model.main_input_name
    generator = torch.Generator().manual_seed(0)
    vision = config.get("vision_config")
    if taken == "pixel_values":
        return {taken: _image(vision if isinstance(vision, dict) else config, generator)}
    if taken == "input_features" and {"num_mel_bins", "max_source_positions"} <= config.keys():
        frames = (1, config["num_mel_bins"], 2 * config["max_source_positions"])
        sound = {taken: torch.randn(frames, generator=generator, dtype=torch.float64)}
        if not model.config.is_encoder_decoder:  # an encoder of sound alone has no vocabulary
            return sound
        return {**sound, "decoder_input_ids": torch.randint(0, config["vocab_size"], (1, 6), generator=generator)}
    if taken != "input_ids":
        raise CheckpointError(f"a small model that reads {taken} cannot be tried out", HINT)
    vocabulary = model.config.get_text_config().to_dict().get("vocab_size")
    if not isinstance(vocabulary, int):
        raise CheckpointError("a small model without a vocabulary cannot be tried out", HINT)
    ids = torch.randint(0, vocabulary, (2, 6), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if isinstance(vision, dict) and not model.can_generate():  # what generates runs on tokens alone
        inputs["pixel_values"] = _image(vision, generator).expand(len(ids), -1, -1, -1)
    return {**inputs, "decoder_input_ids": ids} if model.config.is_encoder_decoder else inputs


def _image(config: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    """A random image, (1, channels, height, width).

    Raises:
        CheckpointError: nothing says how large one is.
    """
    size = config.get("image_size")
    if not isinstance(size, int):
        raise CheckpointError("the size of its images cannot be told", HINT)
    shape = (1, config.get("num_channels", 3), size, size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
