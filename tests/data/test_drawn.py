"""Tokens are drawn as often as a vocabulary says, and nearer to text than at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from aicompress.data import drawn_windows
from aicompress.data.drawn import OFFSET, frequencies
from aicompress.errors import CheckpointError

WHOLE = (True, True)


def test_a_text_is_likelier_than_among_equal_tokens(tiny_llama: Path, text_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokens, weights, origin = frequencies(tokenizer)
    assert origin == "merge ranks"
    assert not set(tokens.tolist()) & set(tokenizer.all_special_ids)
    shares = torch.zeros(len(tokenizer), dtype=torch.float64)
    shares[tokens] = weights / weights.sum()
    ids = torch.tensor(tokenizer(text_file.read_text()[:20_000], add_special_tokens=False)["input_ids"])
    logs = shares[ids].log()
    assert logs.mean() > -torch.tensor(float(len(tokens))).log() + 0.05


def own(model: Any) -> Any:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_frequencies_by_hand() -> None:
    unigram = own(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -3.0)], unk_id=0))
    tokens, weights, origin = frequencies(unigram)
    assert (origin, tokens.tolist()) == ("scores", [1, 2])
    torch.testing.assert_close(weights, torch.tensor([-1.0, -3.0]).double().exp())
    vocabulary = {"<unk>": 0, "z": 1, "a": 2, "b": 3, "c": 4, "bc": 5, "abc": 6}
    pairs = own(models.BPE(vocabulary, [("b", "c"), ("a", "bc")], unk_token="<unk>"))
    tokens, weights, origin = frequencies(pairs)
    ranks = {"z": 2, "a": 1, "b": 0, "c": 0, "bc": 0, "abc": 1}
    assert tokens.tolist() == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(weights, 1 / (torch.tensor(list(ranks.values())).double() + OFFSET))
    words = ["<unk>", "[unused1]", ",", "the", "of", "##x", "##ing", "dog"]
    tokens, weights, origin = frequencies(
        own(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    )
    assert (origin, tokens.tolist()) == ("order of the tokens", [2, 3, 4, 5, 6, 7])
    ranks = {",": 2, "the": 0, "of": 1, "##x": 2, "##ing": 2, "dog": 3}  # a single character has the middle rank
    torch.testing.assert_close(weights, 1 / (torch.tensor(list(ranks.values())).double() + OFFSET))


def test_a_seed_gives_the_same_tokens_between_those_of_the_tokenizer(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    ids, source = drawn_windows(tokenizer, 5, 12, 3, WHOLE)
    assert ids.shape == (5, 12)
    assert set(ids[:, 0].tolist()) == {tokenizer.cls_token_id}
    assert set(ids[:, -1].tolist()) == {tokenizer.sep_token_id}
    assert torch.equal(ids, drawn_windows(tokenizer, 5, 12, 3, WHOLE)[0])
    assert not torch.equal(ids, drawn_windows(tokenizer, 5, 12, 4, WHOLE)[0])
    assert (source.kind, source.samples, source.seed, source.bos) == ("drawn", 5, 3, "[CLS]")
    plain, source = drawn_windows(tokenizer, 5, 12, 3, (False, False))
    assert not set(plain.flatten().tolist()) & set(tokenizer.all_special_ids)
    assert source.bos == ""


def test_what_has_no_tokens_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        drawn_windows(None, 1, 8, 0, WHOLE)
    with pytest.raises(CheckpointError, match="no tokens to draw from"):
        frequencies(own(models.Unigram([("<unk>", 0.0)], unk_id=0)))
