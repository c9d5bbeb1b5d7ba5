"""What the modeling code that ships inside checkpoints does to a model of transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from aicompress.model.hf.modeling_aicompress import forget_tie


class Worked(hf.LlamaForCausalLM):
    """Works out which weights it ties."""

    @property
    def _tied_weights_keys(self) -> dict[str, str]:  # type: ignore[override]
        return {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_tie_that_a_class_works_out_is_forgotten() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    with torch.device("meta"):
        model, other = (Worked(hf.LlamaConfig(**sizes, **heads, tie_word_embeddings=True)) for _ in range(2))
    forget_tie(model, "lm_head.weight")
    assert model._tied_weights_keys == {}
    assert type(model).__name__ == "Worked"
    assert isinstance(model, Worked)
    assert other._tied_weights_keys
