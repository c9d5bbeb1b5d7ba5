"""The loss whose gradients are taken, of models with and without logits."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from aicompress.errors import Refused
from aicompress.model.sensitivity.loss import Objective, Sample

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_all_that_a_model_without_logits_gives_counts() -> None:
    """CLIP gives embeddings of texts and of images, whose projections both have gradients."""
    text = {**SHAPE, "vocab_size": 32, "max_position_embeddings": 8}
    config = hf.CLIPConfig(
        text_config=text, vision_config={**SHAPE, "image_size": 8, "patch_size": 4}, projection_dim=8
    )
    model = hf.CLIPModel(config)
    output = model(input_ids=torch.arange(4)[None], pixel_values=torch.randn(1, 3, 8, 8))
    Objective()(output, Sample(0, {})).backward()
    for layer in (model.text_projection, model.visual_projection):
        assert layer.weight.grad.abs().sum() > 0


def test_an_output_without_gradients_is_refused() -> None:
    with pytest.raises(Refused, match="tuple holds neither logits nor states"):
        Objective()((torch.arange(3),), Sample(0, {}))
