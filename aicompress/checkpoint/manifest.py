"""The manifest of a checkpoint: its compressed parameters, and the lineage of steps that made it.

In a Hugging Face directory the entries live in config.json's `quantization_config` and the lineage in aicompress.json;
a bare file carries both in its metadata under the key `aicompress`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from aicompress.checkpoint.header import DTYPE_NAMES, DTYPES, checked_shape
from aicompress.checkpoint.json_text import parsed
from aicompress.checkpoint.layouts import native_names
from aicompress.errors import CheckpointError, Unsupported, listed
from aicompress.layer import LayerInfo, from_matrix
from aicompress.weights import TensorSpec, Weight, form_of

FORMAT_VERSION = 2  # what is read; 1 is written where no parameter shares tensors, as versions before that read it
KEY = "aicompress"


@dataclass(frozen=True)
class Entry:
    """One compressed parameter.

    Attributes:
        dense: dtype and shape of the parameter it decodes to.
        transposed: the parameter stores (in, out), the stored matrix is (out, in).
        meta: what the stored form needs beside its tensors.
        suffixes: suffixes of its tensors on disk in the native layout; '' is the primary one.
        shared: suffix -> name on disk of those tensors that another parameter stores.
    """

    dense: TensorSpec
    transposed: bool
    meta: dict[str, Any]
    suffixes: tuple[str, ...] = ("",)
    shared: Mapping[str, str] = field(default_factory=dict)

    def decode(self, weight: Weight, rows: int | None = None) -> Tensor:
        """The dense parameter of its weight, or so many entries of its row axis of theirs."""
        shape = (
            self.dense.shape if rows is None else (rows, *self.dense.shape[1:])
        )  # one of (in, out) is turned by itself
        return from_matrix(weight.dense(), shape, self.transposed).to(self.dense.dtype)

    def read_as(self, weight: Weight) -> Entry:
        """The same parameter in the form that it is read in, where its codes are entropy-coded in the files."""
        return replace(self, meta=weight.meta(), suffixes=tuple(weight.tensors()))

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = {
            "shape": list(self.dense.shape),
            "dtype": DTYPE_NAMES[self.dense.dtype],
            "meta": self.meta,
            "tensors": list(self.suffixes),
        }
        plain |= {"shared": dict(self.shared)} if self.shared else {}
        return {**plain, "transposed": True} if self.transposed else plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Entry:
        spec = TensorSpec(DTYPES[plain["dtype"]], checked_shape(plain["shape"]))
        suffixes, shared = tuple(plain["tensors"]), _shared(plain.get("shared", {}))
        return cls(spec, bool(plain.get("transposed")), plain["meta"], suffixes, shared)


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

    @cached_property
    def lent(self) -> dict[str, str]:
        """Tensors on disk that several parameters are made of, each with the parameter that stores it."""
        names = {disk for entry in self.entries.values() for disk in entry.shared.values()}
        stored = {
            disk: name
            for name, entry in (self.entries.items() if names else ())
            for disk in native_names(name, [suffix for suffix in entry.suffixes if suffix not in entry.shared]).values()
        }
        return {disk: stored.get(disk, disk) for disk in names}

    def owners(self, parameter: str) -> dict[str, str]:
        """Parts of a parameter that other parameters store, each with that one; '' is all of it."""
        entry = self.entries.get(parameter)
        if entry is None or not entry.shared:
            return {}
        whole = form_of(entry.meta["form"]).aliases
        return {"" if whole else suffix.partition("_")[0]: self.lent[disk] for suffix, disk in entry.shared.items()}

    def borrowers(self, parameters: Collection[str]) -> list[str]:
        """The parameters that are made of tensors of these, or of such parameters in turn, and are none of them."""
        wanted = set(parameters)
        more = [
            name
            for name, entry in self.entries.items()
            if name not in wanted and any(self.lent[disk] in wanted for disk in entry.shared.values())
        ]
        return [*more, *self.borrowers({*wanted, *more})] if more else []

    def parted(self, later: Manifest, parameters: Collection[str]) -> list[str]:
        """A warning that names parameters which share tensors here and not in a later manifest.

        Args:
            later: of what a step makes of this checkpoint.
            parameters: what it holds.
        """
        shared = [name for name, entry in self.entries.items() if entry.shared and name in parameters]
        apart = [name for name in shared if name not in later.entries or not later.entries[name].shared]
        if not apart:
            return []
        shown = listed(apart)
        return [f"{len(apart)} parameters no longer share what is stored once for them and others: {shown}"]

    def to_json(self) -> dict[str, Any]:
        entries = {name: entry.to_json() for name, entry in self.entries.items()}
        version = FORMAT_VERSION if any(entry.shared for entry in self.entries.values()) else 1
        plain = {"format_version": version, "entries": entries, "lineage": list(self.lineage)}
        return {**plain, "widths": self.widths} if self.widths else plain

    def brief(self) -> Manifest:
        """The same with a lineage that says no more than what was done; the report beside an output says the rest."""
        steps = tuple({"command": step.get("command"), "method": _method(step)} for step in self.lineage)
        return replace(self, lineage=steps)

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


def entries_of(
    dense: Mapping[str, TensorSpec],
    compressed: Mapping[str, tuple[LayerInfo, Weight]],
    owners: Mapping[str, Mapping[str, str]],
) -> dict[str, Entry]:
    """Entries of compressed parameters.

    Args:
        dense: what each decodes to.
        compressed: each as a layer, and the outline of its stored form.
        owners: of those that share tensors, their parts that other parameters store, each with that one.
    """

    def place(name: str, suffix: str) -> str:
        for part, owner in owners.get(name, {}).items():
            borrowed = compressed[name][1].borrowed(part)
            if suffix in borrowed:
                return place(owner, borrowed[suffix])
        return native_names(name, [suffix])[suffix]

    entries: dict[str, Entry] = {}
    for name, (info, weight) in compressed.items():
        lent = [suffix for part in owners.get(name, {}) for suffix in weight.borrowed(part)]
        shared = {suffix: place(name, suffix) for suffix in lent}
        entries[name] = Entry(dense[name], info.transposed, weight.meta(), tuple(weight.tensors()), shared)
    return entries


def _shared(plain: Any) -> dict[str, str]:
    """Names on disk by suffix; the primary tensor is never another's.

    Raises:
        ValueError: something else.
    """
    shared = dict(plain.items())
    if "" in shared or not all(isinstance(part, str) for pair in shared.items() for part in pair):
        raise ValueError
    return shared


def _lineage(plain: Any) -> tuple[dict[str, Any], ...]:
    """Steps, each with its recipe.

    Raises:
        ValueError: something else.
    """
    if not isinstance(plain, list) or not all(isinstance(step, dict) for step in plain):
        raise ValueError
    return tuple(plain)


def _method(step: Mapping[str, Any]) -> Any:
    """The name of a step's method; None where it says none."""
    recipe = step.get("recipe")
    method = recipe.get("method") if isinstance(recipe, dict) else None
    return method.get("name") if isinstance(method, dict) else step.get("method")


def _widths(plain: Any) -> dict[str, dict[str, int]]:
    """Widths by module path.

    Raises:
        ValueError: something else than whole numbers above 0.
    """
    widths = {str(path): {str(name): value for name, value in fields.items()} for path, fields in plain.items()}
    if any(type(value) is not int or value < 1 for fields in widths.values() for value in fields.values()):
        raise ValueError
    return widths
