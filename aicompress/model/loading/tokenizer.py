"""The tokenizer that lies beside a checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from aicompress.errors import CheckpointError

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


def vocabulary_digest(folder: Path | None) -> str | None:
    """A digest of the files that say which number each token has; None where there are none."""
    files = [folder / name for name in FILES if name != "tokenizer_config.json"] if folder is not None else []
    present = [file.read_bytes() for file in files if file.is_file()]
    return hashlib.sha256(b"".join(present)).hexdigest() if present else None


def load_tokenizer(folder: Path | None) -> Any | None:
    """A Hugging Face tokenizer, or None where the folder holds none. The checkpoint's own code is never run.

    Raises:
        CheckpointError: its files cannot be read.
    """
    if folder is None or not any((folder / name).is_file() for name in FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"{folder}: its tokenizer cannot be read: {first}"[:300]
        raise CheckpointError(message, "download or copy its files again") from error
