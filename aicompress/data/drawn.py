"""Token ids drawn from a tokenizer's own vocabulary: calibration without data.

A token's frequency in text falls about as 1 / (rank + offset) (Zipf 1935, with Mandelbrot's offset), and a vocabulary
that was learned from text remembers ranks: byte-pair encodings (Sennrich et al. 2016, arXiv:1508.07909) in the order
of their merges, unigram models (Kudo 2018, arXiv:1804.10959) in the logarithms of probabilities that they keep,
WordPiece in the order of its list. Tokens are drawn independently of each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aicompress.data.sampling import SampleSource
from aicompress.data.tokens import Tokenizer, needed, surrounding
from aicompress.errors import CheckpointError

OFFSET = 30  # of a rank: the most frequent tokens of text are less far apart than 1 / rank says


def frequencies(tokenizer: Tokenizer) -> tuple[Tensor, Tensor, str]:
    """What a tokenizer's vocabulary says of the frequency of its tokens; added and special ones are left out.

    Returns:
        (tokens,) those that can be drawn; (tokens,) float64 how often, up to a factor; what that follows from.

    Raises:
        CheckpointError: it has no tokens that could be drawn.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {}
    model: Mapping[str, Any] = described.get("model", {})
    special = {token["id"] for token in described.get("added_tokens", [])} | set(tokenizer.all_special_ids)
    if model.get("type") == "Unigram":
        scores = {i: float(score) for i, (_, score) in enumerate(model["vocab"]) if i not in special and score < 0}
        by_id, origin = {i: math.exp(score) for i, score in scores.items()}, "scores"
    else:
        ranks, origin = _merge_ranks(model), "merge ranks"
        if not ranks:
            ranks, origin = _order(tokenizer.get_vocab(), special), "order of the tokens"
        by_id = {i: 1.0 / (rank + OFFSET) for i, rank in ranks.items() if i not in special}
    if not by_id:
        raise CheckpointError("the tokenizer's vocabulary holds no tokens to draw from", "give text instead of `drawn`")
    ids = sorted(by_id)
    return torch.tensor(ids), torch.tensor([by_id[i] for i in ids], dtype=torch.float64), origin


def _merge_ranks(model: Mapping[str, Any]) -> dict[int, int]:
    """Ranks of a byte-pair encoding's tokens by id.

    A character has that of the first merge that it takes part in; one that takes part in none, the last.
    """
    if model.get("type") != "BPE" or not model["merges"]:
        return {}
    vocabulary: Mapping[str, int] = model["vocab"]
    prefix = model.get("continuing_subword_prefix") or ""
    made: dict[str, int] = {}
    used: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made.setdefault(left + right.removeprefix(prefix), rank)
        used.setdefault(left, rank)
        used.setdefault(right, rank)
    last = dict.fromkeys(vocabulary, len(model["merges"]))
    return {vocabulary[token]: rank for token, rank in {**last, **used, **made}.items() if token in vocabulary}


def _order(vocabulary: Mapping[str, int], special: set[int]) -> dict[int, int]:
    """Ranks in the order of ids; single characters, which stand in the order of their codes, get the middle rank."""
    known = [
        token for token in sorted(vocabulary, key=lambda token: vocabulary[token]) if vocabulary[token] not in special
    ]
    named = [token for token in known if not token.startswith("[unused")]
    words = [token for token in named if len(token.removeprefix("##")) > 1]
    ranks = {vocabulary[token]: rank for rank, token in enumerate(words)}
    return ranks | {vocabulary[token]: len(words) // 2 for token in named if vocabulary[token] not in ranks}


def drawn_windows(
    tokenizer: Tokenizer | None, samples: int, length: int, seed: int, ends: tuple[bool, bool]
) -> tuple[Tensor, SampleSource]:
    """Independent tokens, (samples, length) int64, and the record.

    Args:
        ends: whether samples begin, and end, with what the tokenizer puts before and after a text.

    Raises:
        CheckpointError: there is no tokenizer, or nothing to draw from.
    """
    tokenizer = needed(tokenizer)
    tokens, weights, origin = frequencies(tokenizer)
    before, after = (part if wanted else [] for part, wanted in zip(surrounding(tokenizer), ends, strict=True))
    inner = max(1, length - len(before) - len(after))
    generator = torch.Generator().manual_seed(seed)
    picked = torch.multinomial(weights, samples * inner, replacement=True, generator=generator)
    ids = tokens[picked].view(samples, inner)
    first, last = (torch.tensor(part, dtype=torch.int64).expand(samples, -1) for part in (before, after))
    bos = " ".join(tokenizer.convert_ids_to_tokens(before))
    source = SampleSource("drawn", f"{origin} of the tokenizer", "", 0, samples, samples, seed, bos=bos)
    return torch.cat([first, ids, last], dim=1), source
