"""What must stay with a token, worked by hand where an algorithm would otherwise choose differently."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

from aicompress.errors import CheckpointError
from aicompress.model.vocabulary.segmentation import segmentation_of
from aicompress.model.vocabulary.vocabulary import Vocabulary


def described(model: Any) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(Tokenizer(model).to_str())
    return plain


def unigram(pieces: dict[str, float]) -> models.Unigram:
    return models.Unigram(list(pieces.items()), unk_id=0)


def test_the_unlikeliest_piece_stays() -> None:
    """An unknown b costs 10 more than it: without z a, ?, cdef would be likelier than a, bc, de, f."""
    pieces = {"<unk>": 0.0, "a": -1.0, "bc": -12.0, "de": -12.0, "cdef": -1.0, "f": -12.0}
    whole, less = unigram({**pieces, "z": -26.0}), unigram(pieces)
    assert [token.value for token in whole.tokenize("abcdef")] == ["a", "bc", "de", "f"]
    assert [token.value for token in less.tokenize("abcdef")] == ["a", "b", "cdef"]
    assert set(segmentation_of(described(whole)).required()) == {"<unk>", "z"}


def test_the_merges_that_make_a_token_are_those_of_lowest_rank() -> None:
    """abc is ab and c, though a and bc would give it, too."""
    tokens = {token: number for number, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    merges = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]
    segmentation = segmentation_of(described(models.BPE(tokens, merges)))
    assert list(segmentation.needs("abc")) == ["ab", "c"]
    assert list(segmentation.needs("bc")) == ["b", "c"]
    vocabulary = Vocabulary(tokens, frozenset(), segmentation, lambda text: True)
    scores = vocabulary.scores(torch.tensor([0.0, 0, 0, 0, 0, 3]), ())
    assert {token for token, number in tokens.items() if scores[number] >= 3} == {"a", "b", "c", "ab", "abc"}
    assert len(set(scores.tolist())) == len(tokens)


def test_an_end_of_a_word_and_a_continuation_are_no_letters() -> None:
    tokens = {token: number for number, token in enumerate(["a", "b", "##b", "b</w>", "##b</w>", "ab</w>"])}
    merges = [("a", "##b</w>")]
    model = models.BPE(tokens, merges, continuing_subword_prefix="##", end_of_word_suffix="</w>")
    segmentation = segmentation_of(described(model))
    assert list(segmentation.needs("ab</w>")) == ["a", "##b</w>"]
    assert [segmentation.text(token) for token in tokens] == ["a", "b", "b", "b", "b", "ab"]


def test_another_algorithm_is_refused() -> None:
    with pytest.raises(CheckpointError, match="of the kind 'Lattice'"):
        segmentation_of({"model": {"type": "Lattice", "vocab": {}}})
