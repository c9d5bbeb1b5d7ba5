"""Which parameters are layers, told from names and shapes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aicompress.checkpoint.naming import is_transposed, kind_in_bare_file, kind_of
from aicompress.weights import TensorSpec

BARE = {
    "rnn.weight_ih": ((16, 4), "linear"),
    "rnn.weight_hh": ((16, 4), "linear"),
    "mamba.in_proj": ((8, 4), "linear"),
    "dense/kernel": ((8, 4), "linear"),
    "W": ((8, 4), "linear"),
    "conv.weight_v": ((8, 4, 3), "conv"),
    "conv.kernel": ((3, 3, 4, 8), "conv"),
    "conv.weight_g": ((8, 1, 1), None),
    "wte": ((50, 8), "embedding"),
    "lm_head": ((50, 8), "head"),
    "rnn.bias_ih": ((1, 16), None),
    "heads.bias": ((4, 16), None),
    "norm.gain": ((4, 16), None),
    "pos_embed": ((9, 16), None),
    "cls_token": ((1, 16), None),
    "rope.cos_cached": ((9, 16), None),
    "ssm.A_log": ((8, 4), None),
    "bn.running_mean": ((4, 4), None),
    "counts": ((1, 16), None),
}


@pytest.mark.parametrize("name", BARE)
def test_every_matrix_of_a_bare_file_is_a_layer(name: str) -> None:
    shape, kind = BARE[name]
    assert kind_in_bare_file(name, TensorSpec(torch.float32, shape)) == kind
    assert kind_in_bare_file(name, TensorSpec(torch.int32, shape)) is None


def test_beside_a_model_definition_only_usual_names_are() -> None:
    assert kind_of("ssm.mixing", TensorSpec(torch.float32, (8, 4))) is None
    assert kind_of("ssm.mixing.weight", TensorSpec(torch.float32, (8, 4))) == "linear"


GPT2 = {"model_type": "gpt2"}


@pytest.mark.parametrize(
    "config", [GPT2, {"model_type": "clvp_decoder"}, {"model_type": "vision-encoder-decoder", "decoder": GPT2}]
)
def test_layers_of_gpt2_are_stored_transposed_wherever_it_is(config: dict[str, Any]) -> None:
    assert is_transposed("decoder.transformer.h.0.attn.c_attn.weight", config)
    assert not is_transposed("encoder.layer.0.attention.query.weight", config)
    assert not is_transposed("transformer.h.0.attn.c_attn.weight", {"model_type": "gpt_bigcode"})
