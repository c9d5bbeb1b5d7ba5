"""The manifest of a checkpoint: its compressed parameters, and the lineage of steps that made it.

In a Hugging Face directory the entries live in config.json's `quantization_config` and the lineage in aicompress.json;
a bare file carries both in its metadata under the key `aicompress`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from aicompress.checkpoint.header import DTYPE_NAMES, DTYPES, checked_shape
from aicompress.checkpoint.json_text import parsed
from aicompress.errors import CheckpointError, Unsupported
from aicompress.layer import from_matrix
from aicompress.weights import TensorSpec, Weight

FORMAT_VERSION = 1
KEY = "aicompress"


@dataclass(frozen=True)
class Entry:
    """One compressed parameter.

    Attributes:
        dense: dtype and shape of the parameter it decodes to.
        transposed: the parameter stores (in, out), the stored matrix is (out, in).
        meta: what the stored form needs beside its tensors.
        suffixes: suffixes of its tensors on disk in the native layout; '' is the primary one.
    """

    dense: TensorSpec
    transposed: bool
    meta: dict[str, Any]
    suffixes: tuple[str, ...] = ("",)

    def decode(self, weight: Weight) -> Any:
        """The dense parameter."""
        return from_matrix(weight.dense(), self.dense.shape, self.transposed).to(self.dense.dtype)

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = {
            "shape": list(self.dense.shape),
            "dtype": DTYPE_NAMES[self.dense.dtype],
            "meta": self.meta,
            "tensors": list(self.suffixes),
        }
        return {**plain, "transposed": True} if self.transposed else plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Entry:
        spec = TensorSpec(DTYPES[plain["dtype"]], checked_shape(plain["shape"]))
        return cls(spec, bool(plain.get("transposed")), plain["meta"], tuple(plain["tensors"]))


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        entries: compressed parameters by name.
        lineage: the steps so far, oldest first.
        widths: attributes of the layers of a plain module that were narrowed since its definition, by module path.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    lineage: tuple[dict[str, Any], ...] = ()
    widths: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        entries = {name: entry.to_json() for name, entry in self.entries.items()}
        plain = {"format_version": FORMAT_VERSION, "entries": entries, "lineage": list(self.lineage)}
        return {**plain, "widths": self.widths} if self.widths else plain

    def to_text(self) -> str:
        text = json.dumps(self.to_json(), separators=(",", ":"), ensure_ascii=False)
        return text.encode(errors="backslashreplace").decode()  # names of files may hold bytes that are no UTF-8

    @classmethod
    def from_json(cls, plain: Any, where: str) -> Manifest:
        """Read a manifest.

        Raises:
            CheckpointError: malformed, or written by a newer version.
        """
        try:
            if plain["format_version"] > FORMAT_VERSION:
                raise Unsupported(f"{where} was written by a newer aicompress", "upgrade aicompress")
            entries = {name: Entry.from_json(fields) for name, fields in plain.get("entries", {}).items()}
            return cls(entries, _lineage(plain.get("lineage", [])), _widths(plain.get("widths", {})))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{where}: its aicompress manifest is malformed", "write the checkpoint again"
            ) from error

    @classmethod
    def from_text(cls, text: str, where: str) -> Manifest:
        try:
            plain = parsed(text.encode("utf-8"))
        except ValueError as error:
            message = f"{where}: its aicompress manifest is not JSON: {error}"
            raise CheckpointError(message, "write the checkpoint again") from error
        return cls.from_json(plain, where)


def _lineage(plain: Any) -> tuple[dict[str, Any], ...]:
    """Steps, each with its recipe.

    Raises:
        ValueError: something else.
    """
    if not isinstance(plain, list) or not all(isinstance(step, dict) for step in plain):
        raise ValueError
    return tuple(plain)


def _widths(plain: Any) -> dict[str, dict[str, int]]:
    """Widths by module path.

    Raises:
        ValueError: something else than whole numbers above 0.
    """
    widths = {str(path): {str(name): value for name, value in fields.items()} for path, fields in plain.items()}
    if any(type(value) is not int or value < 1 for fields in widths.values() for value in fields.values()):
        raise ValueError
    return widths
