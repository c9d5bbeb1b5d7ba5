"""What a packed file says of itself in its metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aicompress.checkpoint.header import HEADER_LIMIT, PACKED
from aicompress.checkpoint.json_text import parsed
from aicompress.errors import CheckpointError, Unsupported

VERSION = 1
FORMAT = "packed by aicompress: run `aicompress unpack`"  # where readers look for the word "pt"
_SHA256 = re.compile("[0-9a-f]{64}")
UNKNOWN = "0" * 64  # until the file has been read


@dataclass(frozen=True)
class PackedManifest:
    """The file that a packed one unpacks to.

    Attributes:
        nbytes: its size.
        header_nbytes: bytes of its header's JSON.
        header: name of the stream that holds it.
        sha256: its digest.
        base: sha256 of the weight files that parts of it are differences to, by name; empty where there are none.
    """

    nbytes: int
    header_nbytes: int
    header: str
    sha256: str = UNKNOWN
    base: Mapping[str, str] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """Strings for the header of the packed file."""
        plain = {"version": VERSION, **vars(self), "base": dict(self.base)}
        text = json.dumps(plain, separators=(",", ":"), ensure_ascii=False)
        return {"format": FORMAT, PACKED: text.encode(errors="backslashreplace").decode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> PackedManifest:
        """Read a manifest.

        Raises:
            CheckpointError: the file is not packed, or its manifest is malformed.
            Unsupported: a newer version wrote it.
        """
        if PACKED not in metadata:
            raise CheckpointError(f"{path} is not packed", "give what `aicompress pack` wrote")
        try:
            plain = parsed(metadata[PACKED].encode())
            if plain["version"] > VERSION:
                raise Unsupported(f"{path} was packed by a newer aicompress", "upgrade aicompress")
            sizes = plain["nbytes"], plain["header_nbytes"]
            if not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes) or sizes[1] > HEADER_LIMIT:
                raise ValueError
            digests = [plain["sha256"], *plain["base"].values()]
            if not isinstance(plain["header"], str) or not all(_SHA256.fullmatch(each) for each in digests):
                raise ValueError
            return cls(*sizes, plain["header"], plain["sha256"], plain["base"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: its manifest is malformed", "pack or download the file again") from error
