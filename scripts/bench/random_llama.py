"""Write a Llama of random bfloat16 weights with a tokenizer, file by file: a model of any size in little memory.

    python -m scripts.bench.random_llama --out build/bench/llama-26 --layers 26

Widths are fixed: 35.4 million parameters a layer, and 98.3 million in the embedding and the head.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from scripts.make_tiny_lm import train_tokenizer

FILES = 4
TEXT = "words.txt"  # text of its tokenizer, to calibrate on


def tensors_of(layers: int, hidden: int, vocabulary: int) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The configuration of the model, and the shapes of its tensors in file order."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return config, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def files_of(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names in `FILES` lists of about the same size."""
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        names.append(name)
        size += torch.Size(shape).numel()
        if size >= total / FILES:
            yield names
            names, size = [], 0
    if names:
        yield names


def gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Matrices of N(0, 0.02²), norms of ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def words(count: int) -> str:
    """Words of random letters, twelve to a line."""
    chance = random.Random(0)
    found = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 8))) for _ in range(count)]
    return "\n".join(" ".join(found[start : start + 12]) for start in range(0, count, 12))


def write(folder: Path, layers: int, hidden: int = 1536, vocabulary: int = 32000) -> int:
    """Write the model; returns its number of parameters."""
    config, shapes = tensors_of(layers, hidden, vocabulary)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    files = list(files_of(shapes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file({name: gaussian(shapes[name], generator) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * count}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    text = words(40_000)
    (folder / TEXT).write_text(text, encoding="utf-8")
    train_tokenizer(text, 512).save_pretrained(folder)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--layers", type=int, default=26)
    given = parser.parse_args(arguments)
    if given.out.exists():
        sys.exit(f"error: {given.out} exists\nhint: remove it, or name another folder with --out")
    print(f"{given.out}: {write(given.out, given.layers)} parameters")


if __name__ == "__main__":
    main()
