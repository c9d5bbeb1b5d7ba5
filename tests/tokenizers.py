"""Small tokenizers of every algorithm, trained on English sentences and a few of other scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.checkpoints import sentences

OTHERS = (
    "функция возвращает последнее значение",
    "имена связаны присваиванием",
    "η συνάρτηση επιστρέφει",
    "café naïve",
)
SPECIAL = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def corpus() -> list[str]:
    return [*sentences(300), *OTHERS * 6]


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = [*SPECIAL.values(), "[unused0]", "[unused1]"]
    trained(tokenizer, trainers.WordPieceTrainer(vocab_size=520, special_tokens=special, show_progress=False))
    return without_added(tokenizer, special[-2:])


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = list(SPECIAL.values())
    settings = {"vocab_size": 620, "special_tokens": special, "initial_alphabet": alphabet}
    return trained(tokenizer, trainers.BpeTrainer(**settings, show_progress=False))


def unigram() -> Tokenizer:
    """Pieces with scores, of which those of bytes stand for unknown characters."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    settings = {"vocab_size": 420, "special_tokens": list(SPECIAL.values()), "unk_token": "<unk>"}
    trained(tokenizer, trainers.UnigramTrainer(**settings, show_progress=False))
    described = json.loads(tokenizer.to_str())
    described["model"]["vocab"] += [[piece, -20.0] for piece in BYTES]
    described["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(described))


def merged_pieces() -> Tokenizer:
    """Byte-pair encoding of characters as sentencepiece has it: every way to merge a token is a merge."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*SPECIAL.values(), *BYTES]
    trained(tokenizer, trainers.BpeTrainer(vocab_size=760, special_tokens=special, show_progress=False))
    described = json.loads(tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    made = sorted((token for token in vocabulary if token not in special), key=vocabulary.__getitem__)
    splits = [(token[:at], token[at:]) for token in made for at in range(1, len(token))]
    described["model"]["merges"] = [pair for pair in splits if set(pair) <= vocabulary.keys()]
    return without_added(Tokenizer.from_str(json.dumps(described)), BYTES)


def without_added(tokenizer: Tokenizer, names: list[str]) -> Tokenizer:
    """The tokenizer to which these tokens are the algorithm's own."""
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] not in names]
    return Tokenizer.from_str(json.dumps(described))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "word_piece": word_piece, "byte_level": byte_level, "unigram": unigram, "merged_pieces": merged_pieces
}  # fmt: skip


# Tokens that stay whatever a text uses.
ALWAYS: dict[str, set[str]] = {
    "word_piece": set(SPECIAL.values()), "byte_level": set(pre_tokenizers.ByteLevel.alphabet()),
    "unigram": set(BYTES), "merged_pieces": set(BYTES),
}  # fmt: skip


def trained(tokenizer: Tokenizer, trainer: Any, texts: Iterable[str] | None = None) -> Tokenizer:
    tokenizer.train_from_iterator(corpus() if texts is None else texts, trainer)
    return tokenizer


def save(kind: str, folder: Path) -> int:
    """Write a tokenizer that puts <s> and </s> around a text and has two added tokens.

    Returns:
        How many tokens it has.
    """
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("qzx", special=False)])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names = {f"{name}_token": token for name, token in SPECIAL.items()}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names)
    fast.save_pretrained(folder)
    return len(fast)
