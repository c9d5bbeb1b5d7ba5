"""Train a small Llama with its own BPE tokenizer on a text, and write it as a Hugging Face folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def train_tokenizer(text: str, vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with <s> at 0 and </s> at 1, as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def build(vocabulary: int, hidden: int, layers: int, context: int) -> Any:
    """A Llama with grouped-query attention (heads of 32, two to a key) and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = hidden // 32
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden - hidden % 64,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def train(
    model: Any,
    ids: Tensor,
    *,
    steps: int,
    windows: tuple[int, int],
    generator: torch.Generator,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train on random `windows` (batch, length) of a token sequence: AdamW, warm-up then cosine, clipped gradients."""
    batch, length = windows
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, betas=(0.9, 0.95))
    warm_up = max(1, steps // 20)

    def factor(step: int) -> float:
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / warm_up) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for step in range(steps):
        starts = torch.randint(0, len(ids) - length, (batch,), generator=generator)
        inputs = torch.stack([ids[start : start + length] for start in starts.tolist()])  # (batch, length)
        loss = model(input_ids=inputs, labels=inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, float(loss.detach()))
    model.eval()
