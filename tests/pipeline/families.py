"""One small random model of each family, and where its blocks and feed-forward layers are, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
GQA = {"num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Family:
    """How a test reads a model by hand.

    Attributes:
        build: makes the model.
        stacks: name of a stack on disk -> attribute path of its module list.
        producers, consumer: attribute paths in a block.
        inputs: what its forward takes.
    """

    build: Callable[[], Any]
    stacks: dict[str, str]
    producers: tuple[str, ...]
    consumer: str
    inputs: Callable[[], dict[str, Tensor]]

    def saved(self, folder: Path) -> Any:
        """The model, written to a folder."""
        torch.manual_seed(0)
        model = self.build().eval()
        model.save_pretrained(folder)
        return model

    def blocks(self, model: Any, stack: str) -> nn.ModuleList:
        found = attrgetter(self.stacks[stack])(model)
        assert isinstance(found, nn.ModuleList)
        return found

    def output(self, model: Any) -> Tensor:
        """First output of a forward pass."""
        with torch.inference_mode():
            result = model(**self.inputs())
        return result[0]


def gemma3n(blocks: int, shared: int) -> hf.Gemma3nForCausalLM:
    """Blocks of two kinds in turn, the last ones without keys: they read those of the last block of their kind."""
    shape = {
        **SHAPE,
        "num_hidden_layers": blocks,
        "intermediate_size": [48] * blocks,
        "activation_sparsity_pattern": [0.0] * blocks,
    }
    own = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2}
    kinds = ["sliding_attention", "full_attention"] * (blocks // 2)
    fields = {**shape, **TEXT, **GQA, **own, "layer_types": kinds, "num_kv_shared_layers": shared, "sliding_window": 4}
    return hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**fields))


def gemma4(blocks: int, shared: int) -> hf.Gemma4ForCausalLM:
    """As `gemma3n`, with blocks that differ in the size of heads too."""
    own = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "global_head_dim": 8}
    kinds = ["sliding_attention", "full_attention"] * (blocks // 2)
    fields = {**SHAPE, **TEXT, **GQA, **own, "num_hidden_layers": blocks, "layer_types": kinds, "sliding_window": 4}
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**fields, num_kv_shared_layers=shared))


def ids() -> Tensor:
    return torch.arange(3, 35).reshape(2, 16)


def tokens() -> dict[str, Any]:
    return {"input_ids": ids()}


def uncached() -> dict[str, Any]:
    return {"input_ids": ids(), "use_cache": False}


def images() -> dict[str, Any]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}


def text_pairs() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids() % 40, "use_cache": False}


def speech() -> dict[str, Any]:
    features = torch.linspace(-1, 1, 2 * 8 * 32).reshape(2, 8, 32)
    return {"input_features": features, "decoder_input_ids": ids(), "use_cache": False}


def decoder(model: type, config: type, **fields: Any) -> Family:
    """A decoder of the Llama kind."""
    gated = ("mlp.gate_proj", "mlp.up_proj")
    build = lambda: model(config(**{**SHAPE, **TEXT, **fields}))  # noqa: E731
    return Family(build, {"model.layers": "model.layers"}, gated, "mlp.down_proj", uncached)


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=32, **TEXT))


def t5() -> Any:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_decoder_layers": 3, "num_heads": 4}
    special = {"vocab_size": 64, "feed_forward_proj": "gated-gelu", "initializer_factor": 2.0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**shape, **special, decoder_start_token_id=0))


def whisper() -> Any:
    sides = {"encoder_layers": 4, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32, "num_mel_bins": 8}
    lengths = {"max_source_positions": 16, "max_target_positions": 16, "vocab_size": 64, "init_std": 0.3}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sides, **heads, **lengths, **special))


def distilbert() -> Any:
    shape = {"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4, "vocab_size": 64, "initializer_range": 0.3}
    return hf.DistilBertModel(hf.DistilBertConfig(**shape))


def vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=8, initializer_range=0.3, **SHAPE))


def neox() -> Any:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SHAPE, **TEXT))


BERT_FFN = (("intermediate.dense",), "output.dense")
FAMILIES = {
    "llama": decoder(hf.LlamaForCausalLM, hf.LlamaConfig, **GQA),
    "llama-tied": decoder(hf.LlamaForCausalLM, hf.LlamaConfig, **GQA, tie_word_embeddings=True, mlp_bias=True),
    "qwen3": decoder(
        hf.Qwen3ForCausalLM, hf.Qwen3Config, **GQA, use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
    "gemma": decoder(hf.GemmaForCausalLM, hf.GemmaConfig, **GQA),
    "gemma3": decoder(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, **GQA, sliding_window=4, sliding_window_pattern=2),
    "gpt2": Family(gpt2, {"transformer.h": "transformer.h"}, ("mlp.c_fc",), "mlp.c_proj", uncached),
    "gpt-neox": Family(
        neox, {"gpt_neox.layers": "gpt_neox.layers"}, ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", uncached
    ),
    "bert": Family(
        lambda: hf.BertModel(hf.BertConfig(**SHAPE, vocab_size=64, initializer_range=0.3)),
        {"encoder.layer": "encoder.layer"}, *BERT_FFN, tokens,
    ),
    "bert-head": Family(
        lambda: hf.BertForMaskedLM(hf.BertConfig(**SHAPE, vocab_size=64, initializer_range=0.3)),
        {"bert.encoder.layer": "bert.encoder.layer"}, *BERT_FFN, tokens,
    ),
    "distilbert": Family(distilbert, {"transformer.layer": "transformer.layer"}, ("ffn.lin1",), "ffn.lin2", tokens),
    "vit": Family(vit, {"vit.encoder.layer": "vit.layers"}, ("mlp.fc1",), "mlp.fc2", images),
    "t5": Family(
        t5, {"encoder.block": "encoder.block", "decoder.block": "decoder.block"},
        ("layer.-1.DenseReluDense.wi_0", "layer.-1.DenseReluDense.wi_1"), "layer.-1.DenseReluDense.wo", text_pairs,
    ),
    "whisper": Family(
        whisper, {"model.encoder.layers": "model.encoder.layers", "model.decoder.layers": "model.decoder.layers"},
        ("fc1",), "fc2", speech,
    ),
}  # fmt: skip


def module(block: nn.Module, path: str) -> Any:
    """A module of a block; numbers index lists, from the end if negative."""
    found: Any = block
    for piece in path.split("."):
        found = found[int(piece)] if piece.lstrip("-").isdigit() else getattr(found, piece)
    return found


def silence(family: Family, model: Any, width: Callable[[int], int]) -> list[list[int]]:
    """Take the neurons of least product of norms out of a model by hand: their consumers' weights become zero.

    Returns:
        For each feed-forward layer the neurons that stay.
    """
    kept = []
    for stack in family.stacks:
        for block in family.blocks(model, stack):
            consumer = module(block, family.consumer)
            columns = consumer.weight if isinstance(consumer, hf.pytorch_utils.Conv1D) else consumer.weight.t()
            score = columns.norm(dim=1)
            for path in family.producers:
                producer = module(block, path)
                rows = producer.weight.t() if isinstance(producer, hf.pytorch_utils.Conv1D) else producer.weight
                bias = producer.bias if producer.bias is not None else torch.zeros(len(rows))
                score = score * torch.cat([rows, bias[:, None]], dim=1).norm(dim=1)
            stay = sorted(score.topk(width(len(score))).indices.tolist())
            gone = [neuron for neuron in range(len(score)) if neuron not in stay]
            with torch.no_grad():
                columns[gone] = 0
            kept.append(stay)
    return kept
