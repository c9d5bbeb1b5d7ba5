"""Try a tokenizer with fewer tokens before it is written: texts of tokens that stay are divided as before."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aicompress.errors import CheckpointError
from aicompress.model.loading.tokenizer import load_tokenizer
from aicompress.model.vocabulary.files import TokenFiles
from aicompress.model.vocabulary.vocabulary import Vocabulary

READ = (".json", ".txt", ".jinja")  # files that a tokenizer is loaded from
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
HINT = "its vocabulary cannot be pruned; drop fewer tokens, or none"


def require_same_tokens(
    tokenizer: Any, vocabulary: Vocabulary, files: TokenFiles, config: Mapping[str, Any], names: Sequence[Path]
) -> None:
    """Load the tokenizer that would be written, and let it divide the texts of the tokens that stay.

    Args:
        tokenizer: before.
        vocabulary: its tokens.
        files: of the tokenizer with fewer tokens.
        config: config.json of the output.
        names: files beside the input's weights.

    Raises:
        CheckpointError: it does not load, or divides one of them otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        for name in names:
            if len(name.parts) == 1 and name.suffix in READ and name not in files.left_out:
                content = files.written.get(name)
                (Path(folder) / name).write_bytes((files.folder / name).read_bytes() if content is None else content)
        smaller = load_tokenizer(Path(folder))
    number = files.numbering
    for kind in SPECIAL:
        before, after = (getattr(each, f"{kind}_token_id", None) for each in (tokenizer, smaller))
        if after != (None if before is None else number(before)):
            raise CheckpointError(f"the {kind} token would be {after}, not that of before", HINT)
    texts = list(_texts(vocabulary, number.kept))
    for text, before, after in zip(texts, _divided(tokenizer, texts), _divided(smaller, texts), strict=True):
        new = [number(token) for token in before]
        if None not in new and new != after:
            raise CheckpointError(f"the tokenizer would divide {text[:40]!r} otherwise than before", HINT)


def _texts(vocabulary: Vocabulary, kept: Iterable[int]) -> Iterable[str]:
    """What every token that stays stands for, alone and behind a letter."""
    token_of = {number: token for token, number in vocabulary.segmentation.ids.items()}
    for number in kept:
        text = vocabulary.segmentation.text(token_of[number]) if number in token_of else None
        if text:
            yield from (text, f"a{text}")


def _divided(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    divided: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    return divided
