"""Write the small checkpoints, the text and the arrays that the runs read, all from fixed seeds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn

from scripts.make_demo_text import reference, sentences
from scripts.make_tiny_lm import train_tokenizer

VOCABULARY = 384
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "pad_token_id": 0, "initializer_range": 0.1}
DECODER = {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}


class Cnn(nn.Module):
    """Two convolutions with batch norms, then one linear layer; images (batch, 1, 28, 28)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 6 * 6, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(images))))))
        return self.fc(hidden.flatten(1))


def mlp() -> nn.Module:
    """fc1, fc2 and fc3: 784-300-100-10."""
    layers = {"fc1": nn.Linear(784, 300), "fc2": nn.Linear(300, 100), "fc3": nn.Linear(100, 10)}
    return nn.ModuleDict(layers)


def wide() -> nn.Module:
    """A bfloat16 layer of more than two million weights: it is done in blocks of rows."""
    return nn.ModuleDict({"fc": nn.Linear(2048, 1100)}).bfloat16()


def llama(**fields: Any) -> Any:
    """A Llama with two queries to a key, and tied embeddings unless the fields say otherwise."""
    tied = {"tie_word_embeddings": True}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**SHAPE, **TEXT, **DECODER, **tied, **fields}))


def mixtral() -> Any:
    """A Mixtral of two blocks with eight experts, two of them for a token."""
    fields = {"num_hidden_layers": 2, "num_local_experts": 8}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**{**SHAPE, **TEXT, **DECODER, **fields}))


def resnet() -> Any:
    """A ResNet of two stages; images (batch, 3, 32, 32)."""
    widths = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "basic"}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**widths, num_labels=5, image_size=32))


def write_all(folder: Path) -> None:
    """Write every input into a new folder."""
    folder.mkdir()
    lines = list(itertools.chain.from_iterable(sentences(reference()).values()))[:400]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer("\n".join(lines), VOCABULARY)
    tokenizer.pad_token = "<s>"
    torch.manual_seed(0)
    bert = hf.BertConfig(**SHAPE, **TEXT)
    models = {
        "llama": llama(),
        "llama-bf16": llama(tie_word_embeddings=False).bfloat16(),
        "mixtral": mixtral(),
        "bert": hf.BertModel(bert),
        "classifier": hf.BertForSequenceClassification(bert),
        "resnet": resnet(),
    }
    for name, model in models.items():
        limit = "200KB" if name == "llama-bf16" else "1GB"  # the one that is read in shards
        model.eval().save_pretrained(folder / name, max_shard_size=limit)
        if name != "resnet":
            tokenizer.save_pretrained(folder / name)
    shape = json.loads((folder / "llama" / "config.json").read_text(encoding="utf-8"))
    (folder / "student.json").write_text(json.dumps({**shape, "num_hidden_layers": 2}), encoding="utf-8")
    _describe_sentences(folder / "bert")
    for name, module in {"mlp": mlp(), "cnn": Cnn(), "wide": wide()}.items():
        save_file(module.state_dict(), folder / f"{name}.safetensors")
    _write_arrays(folder / "arrays.npz")


def _describe_sentences(folder: Path) -> None:
    """Add the files by which sentence-transformers knows how tokens become an embedding."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))


def _write_arrays(path: Path) -> None:
    """Write grey images with labels of ten classes for the bare networks, and colour images for the ResNet."""
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"images": random.normal(size=(32, 3, 32, 32)).astype(np.float32)}
    for part, count in (("train", 256), ("test", 128)):
        arrays[f"{part}_images"] = random.integers(0, 256, (count, 1, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = random.integers(0, 10, count, dtype=np.uint8)
    np.savez(path, **arrays)
