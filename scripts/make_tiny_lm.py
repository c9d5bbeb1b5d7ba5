"""Train a small Llama with its own BPE tokenizer on a text, and write it as a Hugging Face folder."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aicompress.data import Data, token_windows


def train_tokenizer(text: str, vocabulary: int, alphabet: Sequence[str] = ()) -> Any:
    """A byte-level BPE tokenizer with <s> at 0 and </s> at 1, as a transformers tokenizer.

    Args:
        alphabet: characters that always have a token, as byte-level BPE writes them; none means every byte.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=list(alphabet) or sorted(pre_tokenizers.ByteLevel.alphabet()),
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


def perplexity(model: Any, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood of every token after the first of its window (windows, length)."""
    with torch.no_grad():
        losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(16)]
    return math.exp(sum(losses) / len(windows))


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path("build/text/train.txt"), help="training text")
    parser.add_argument("--heldout", type=Path, default=Path("build/text/heldout.txt"), help="text for the perplexity")
    parser.add_argument("--out", type=Path, default=Path("build/tiny-lm"), help="folder of the model")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=128, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = options(arguments)
    for path in (given.text, given.heldout):
        if not path.is_file():
            sys.exit(f"error: {path} does not exist\nhint: scripts/make_demo_text.py writes it")
    if given.out.exists():
        sys.exit(f"error: {given.out} exists\nhint: remove it, or name another folder with --out")
    torch.manual_seed(given.seed)
    text = given.text.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text, given.vocabulary)
    model = build(given.vocabulary, given.hidden, given.layers, context=2 * given.length)
    ids = torch.tensor(tokenizer(text)["input_ids"])

    def progress(step: int, loss: float) -> None:
        if step % 100 == 0 or step == given.steps:
            print(f"step {step} of {given.steps}: loss {loss:.3f}", flush=True)

    generator = torch.Generator().manual_seed(given.seed)
    windows = (given.batch, given.length)
    train(model, ids, steps=given.steps, windows=windows, generator=generator, progress=progress)
    data = Data(text=str(given.heldout), length=given.length)
    score = perplexity(model, token_windows(data, tokenizer)[0])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.out.parent, prefix=f".{given.out.name}.") as beside:
        part = Path(beside) / "model"
        tokenizer.save_pretrained(part)
        model.save_pretrained(part)
        os.replace(part, given.out)
    print(f"{given.out}: {model.num_parameters()} parameters, held-out perplexity {score:.2f}")


if __name__ == "__main__":
    main()
