"""Small real checkpoints that tests compress: transformer folders and bare .safetensors files, built from seeds."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from scripts import make_demo_text, make_tiny_lm

VOCABULARY = 256
PRINTABLE = [chr(code) for code in range(32, 127)] + [
    "Ġ",
    "Ċ",
]  # the byte-level names of printable ASCII, space, newline


@cache
def _reference() -> tuple[str, ...]:
    return tuple(itertools.chain.from_iterable(make_demo_text.sentences(make_demo_text.reference()).values()))


def sentences(count: int, skip: int = 0) -> list[str]:
    """Plain English sentences out of the language reference that ships inside Python; there are about 1800."""
    return list(_reference()[skip : skip + count])


def _save_byte_level_tokenizer(folder: Path, vocabulary: int = VOCABULARY, pad: str | None = None) -> Any:
    """A byte-level BPE tokenizer as GPT-2 and Llama 3 use; its alphabet is ASCII, to leave room for merges."""
    tokenizer = make_tiny_lm.train_tokenizer("\n".join(sentences(600)), vocabulary, PRINTABLE)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)
    return tokenizer


def _save_word_piece_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer as BERT uses: lower case, [CLS] sentence [SEP], [PAD] at 0."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sentences(600), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    tokens = {f"{name}_token": f"[{name.upper()}]" for name in names}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **tokens).save_pretrained(folder)


def save(model: Any, folder: Path, dtype: torch.dtype, shards: int) -> Path:
    """Write a transformers model as safetensors, in one file or in at least `shards`."""
    model = model.to(dtype).eval()
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = nbytes if shards == 1 else nbytes // shards  # whole tensors only, so a shard ends below the limit
    model.save_pretrained(folder, max_shard_size=limit)
    return folder


def make_llama(
    folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1, tied: bool = True, steps: int = 0, **config: Any
) -> Path:
    """A Llama with grouped-query attention (4 heads on 2) and its byte-level tokenizer.

    Args:
        steps: training steps on the language reference before saving; 0 leaves random weights.
        config: LlamaConfig fields to override.
    """
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "vocab_size": VOCABULARY}
    special = {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": tied, "initializer_range": 0.1}
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **special, **config}))
    tokenizer = _save_byte_level_tokenizer(folder, model.config.vocab_size)
    if steps:
        ids = torch.tensor(tokenizer("\n".join(sentences(1400)))["input_ids"])
        generator = torch.Generator().manual_seed(0)
        make_tiny_lm.train(model, ids, steps=steps, windows=(8, 64), generator=generator)
    return save(model, folder, dtype, shards)


def make_gpt2(folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1, **config: Any) -> Path:
    """A GPT-2: Conv1D weights stored (in, out), fused qkv, learnt positions, tied head."""
    torch.manual_seed(1)
    shape = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": VOCABULARY}
    model = GPT2LMHeadModel(
        GPT2Config(**{**shape, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.1, **config})
    )
    _save_byte_level_tokenizer(folder)
    return save(model, folder, dtype, shards)


def make_bert(folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1, **config: Any) -> Path:
    """A BERT encoder without prefix, with WordPiece tokenizer and the side files of sentence-transformers."""
    torch.manual_seed(2)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "pad_token_id": 0}
    model = BertModel(BertConfig(**{**shape, "initializer_range": 0.1, **config}))
    _save_word_piece_tokenizer(folder)
    _sentence_transformers_files(folder, model.config.hidden_size)
    return save(model, folder, dtype, shards)


def _sentence_transformers_files(folder: Path, width: int) -> None:
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    pooling = {"word_embedding_dimension": width, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules, indent=2))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2))
    limits = {"max_seq_length": 128, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(limits, indent=2))


def add_dense(folder: Path, out: int) -> Path:
    """Let the sentence embeddings of an encoder go through a Dense module after they are pooled."""
    modules = json.loads((folder / "modules.json").read_text())
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    dense = folder / "3_Dense"
    dense.mkdir()
    draw = torch.Generator().manual_seed(0)
    save_file({"linear.weight": torch.randn(out, width, generator=draw)}, dense / "model.safetensors")
    (dense / "config.json").write_text(json.dumps({"in_features": width, "out_features": out, "bias": False}))
    modules.insert(2, {"idx": 3, "name": "3", "path": dense.name, "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules, indent=2))
    return folder


def make_static_encoder(folder: Path, table: str, place: str) -> Path:
    """A table of embeddings alone, with its tokenizer, as sentence-transformers reads it.

    Args:
        folder: where it goes.
        table: the tensor's name.
        place: the folder itself, as modules.json writes it.
    """
    _save_word_piece_tokenizer(folder)
    draw = torch.Generator().manual_seed(0)
    save_file({table: torch.randn(VOCABULARY, 64, generator=draw)}, folder / "model.safetensors")
    module = {"idx": 0, "name": "0", "path": place, "type": "sentence_transformers.models.StaticEmbedding"}
    (folder / "modules.json").write_text(json.dumps([module]))
    return folder


def make_t5(folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1, **config: Any) -> Path:
    """A T5: encoder, decoder and one shared embedding."""
    torch.manual_seed(3)
    shape = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "vocab_size": VOCABULARY,
    }
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(**{**shape, **special, **config}))
    _save_byte_level_tokenizer(folder, pad="<s>")
    return save(model, folder, dtype, shards)


def make_mixtral(folder: Path, experts: int = 4) -> Path:
    """A Mixtral of two blocks, two experts a token: w1, w2 and w3 of each expert in the file, merged in the model."""
    torch.manual_seed(5)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128}
    config = MixtralConfig(**shape, num_local_experts=experts, initializer_range=0.2, bos_token_id=0, eos_token_id=1)
    _save_byte_level_tokenizer(folder)
    return save(MixtralForCausalLM(config), folder, torch.float32, 1)


def make_qwen_moe(folder: Path, experts: int = 4) -> Path:
    """A Qwen3-MoE of two blocks, two experts a token: gate_proj, up_proj and down_proj of each expert in the file."""
    torch.manual_seed(6)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "head_dim": 8}
    routing = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Qwen3MoeConfig(**shape, **routing, initializer_range=0.2, bos_token_id=0, eos_token_id=1)
    _save_byte_level_tokenizer(folder)
    return save(Qwen3MoeForCausalLM(config), folder, torch.float32, 1)


def make_vit(folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1, **config: Any) -> Path:
    """A ViT classifier of 28x28 one-channel images in ten classes: a convolution, linears, no tokenizer."""
    torch.manual_seed(4)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10}
    return save(
        ViTForImageClassification(ViTConfig(**{**shape, "initializer_range": 0.1, **config})), folder, dtype, shards
    )


def digits(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 28, 28) uint8 of ten fixed patterns, shifted and noisy, and their labels (count,)."""
    patterns = np.random.default_rng(0).random((10, 7, 7)) > 0.6
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, count)
    images = np.kron(patterns[labels], np.ones((1, 4, 4))) * 160.0  # (count, 28, 28)
    shifts = generator.integers(-2, 3, (count, 2))
    images = np.stack([np.roll(image, tuple(shift), (0, 1)) for image, shift in zip(images, shifts, strict=True)])
    images = images + generator.normal(0, 150, images.shape)
    return images.clip(0, 255).astype(np.uint8), labels.astype(np.uint8)


def make_digits(path: Path, train: int = 1000, test: int = 400) -> Path:
    """An .npz with train_images, train_labels, test_images, test_labels, named as in MNIST."""
    train_images, train_labels = digits(train, seed=1)
    test_images, test_labels = digits(test, seed=2)
    np.savez(
        path, train_images=train_images, train_labels=train_labels, test_images=test_images, test_labels=test_labels
    )
    return path


class Mlp(nn.Module):
    """784-300-100-10 with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(images.flatten(1)))
        return self.fc3(torch.relu(self.fc2(hidden)))


class Cnn(nn.Module):
    """Two unpadded 3x3 convolutions with batch norm and pooling, then one linear layer; images (batch, 1, 28, 28)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 5 * 5, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.max_pool2d(torch.relu(self.bn1(self.conv1(images))), 2)
        hidden = torch.max_pool2d(torch.relu(self.bn2(self.conv2(hidden))), 2)
        return self.fc(hidden.flatten(1))


class Lstm(nn.Module):
    """A two-layer LSTM over an embedding, with a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.fc = nn.Embedding(64, 16), nn.LSTM(16, 32, 2, batch_first=True), nn.Linear(32, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.lstm(self.embed(ids))[0][:, -1])


def learn(model: nn.Module, count: int = 1000, epochs: int = 4) -> nn.Module:
    """Train a classifier on the digits of `make_digits` until it is far better than chance."""
    images, labels = digits(count, seed=1)
    inputs = torch.from_numpy(images).float().div(255).unsqueeze(1)  # (count, 1, 28, 28)
    targets = torch.from_numpy(labels).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for start in range(0, count, 50):
            optimizer.zero_grad()
            logits = model(inputs[start : start + 50])
            nn.functional.cross_entropy(logits, targets[start : start + 50]).backward()
            optimizer.step()
    return model.eval()


def make_file(path: Path, model: nn.Module, dtype: torch.dtype = torch.float32) -> Path:
    """A bare .safetensors file of a module's state; integer buffers keep their dtype."""
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    save_file({name: t.contiguous() for name, t in state.items()}, path, metadata={"format": "pt"})
    return path
