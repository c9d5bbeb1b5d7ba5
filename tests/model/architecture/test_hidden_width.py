from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from aicompress.errors import CheckpointError
from aicompress.model.architecture import hidden_width as tested
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.hidden_width import residual
from aicompress.weights import TensorSpec

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


def architecture(model: Any) -> Architecture:
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    specs = {name: TensorSpec.of(tensor) for name, tensor in model.state_dict().items()}
    return Architecture.of(config, specs)


def test_every_axis_of_the_stream_and_no_other() -> None:
    found = residual(architecture(hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, num_key_value_heads=2))))
    assert (found.width, found.field) == (32, ("hidden_size",))
    axes = {c.tensor.removeprefix("model."): (c.axis, c.role) for c in found.couplings}
    assert axes["embed_tokens.weight"] == (1, "producer")
    assert axes["layers.2.self_attn.q_proj.weight"] == (1, "consumer")
    assert axes["layers.2.self_attn.o_proj.weight"] == (0, "producer")
    assert axes["layers.0.mlp.down_proj.weight"] == (0, "producer")
    assert axes["norm.weight"] == (0, "producer")
    assert axes["lm_head.weight"] == (1, "consumer")
    assert len(axes) == 3 * 9 + 3
    assert found.refusal(24) is None
    assert "multiple of the number of attention heads" in str(found.refusal(30))


def test_a_tied_head_is_no_reader() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, tie_word_embeddings=True))
    roles = {c.tensor: c.role for c in residual(architecture(model)).couplings}
    assert roles["model.embed_tokens.weight"] == "producer"
    assert roles.get("lm_head.weight", "producer") == "producer"


def test_coordinates_that_do_not_play_one_part_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture whose forward pass treats the first coordinate as a special one."""

    class Odd(hf.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + self.model.norm.weight[0]
            return output

    def build(config: Any) -> nn.Module:
        with torch.device("meta"):
            return Odd(hf.LlamaConfig.from_dict(dict(config)))

    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE))
    known = architecture(model)
    monkeypatch.setattr(tested, "build", build)
    with pytest.raises(CheckpointError, match="do not all play one part"):
        residual(known)


def test_what_reads_the_stream_and_what_lies_in_heads() -> None:
    found = residual(architecture(hf.BertModel(hf.BertConfig(**SHAPE))))
    stream = {(c.tensor, c.axis) for c in found.couplings}
    inner = {(c.tensor, c.axis) for c in found.inner}
    layer = "encoder.layer.1.attention"
    assert {(f"{layer}.self.{name}.weight", 0) for name in ("query", "key", "value")} < inner
    assert {(f"{layer}.self.query.weight", 1), (f"{layer}.output.dense.weight", 0)} < stream
    assert {(f"{layer}.output.dense.weight", 1), (f"{layer}.self.key.bias", 0)} < inner
    assert {("pooler.dense.weight", 0), ("pooler.dense.weight", 1), ("pooler.dense.bias", 0)} < stream
    assert (found.heads, len(found.inner)) == (4, 3 * 7)


def test_rotary_positions_hold_the_entries_of_a_head_together() -> None:
    with pytest.raises(CheckpointError, match="square matrices hold heads"):
        residual(architecture(hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SHAPE))))
