"""The contract of every stored form, and how the forms are found: every class in `stored/` that names its form."""

from __future__ import annotations

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from aicompress.weights.coding.rows import RowStorage, StoredTensor, share

Nested = TypeVar("Nested")


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a stored tensor: all that a file header says of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        return cls(tensor.dtype, tuple(tensor.shape))


@dataclass(frozen=True)
class Symbols:
    """How a stored tensor holds codes, indices or a mask: whole numbers that can be entropy-coded.

    Attributes:
        kind: bits of a symbol in packed rows of int32 words; `trellis`, where those are 8 and belong to two quantizers;
            or `mask`, one bit each; `bytes`; `int8`.
        rows, columns: of symbols.
    """

    kind: int | str
    rows: int
    columns: int

    @property
    def bits(self) -> int:
        """Bits of a symbol in packed rows of words; 0 where it does not lie in such."""
        return 8 if self.kind == "trellis" else self.kind if isinstance(self.kind, int) else 0


class Weight(ABC):
    """A matrix (out, in) in one stored form.

    A form sets `form`, the name that a manifest has it by, and its file registers a decoder for readers without this
    package (`decoding.decoder`). The tensor under the empty suffix is the primary one: it is stored under the
    parameter's own name, with a shape that the dense parameter can never have, so that a reader which does not know the
    form raises a size mismatch instead of loading noise.
    """

    form: ClassVar[str]
    aliases: ClassVar[bool] = False  # whether it is another parameter's weight, with nothing of its own
    # Of its parts, where it has some: the outer one is given what the inner one gives.
    is_product: ClassVar[bool] = True
    # By fields that hold weights, what the suffixes of their tensors begin with: '' of that with the primary tensor.
    prefixes: ClassVar[Mapping[str, str]] = {}
    # Suffixes of its own tensors that say how its codes are read: scales, zero points, tables, factors of columns.
    scales: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Logical shape (out, in)."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is written to disk: suffix -> tensor. The primary tensor has the suffix ''."""

    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """JSON-ready facts that `restore` needs beside the tensors, `form` among them."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The float32 matrix (out, in) that this form stands for.

        Raises:
            RuntimeError, ValueError: the tensors do not fit one another; an outline raises as well.
        """

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of `dense()`, (stop - start, in) float32, the caller's to change; a form that can decodes only those."""
        return self.dense()[start:stop]

    def row_storage(self) -> RowStorage | None:
        """How its own tensors hold its rows in proportion; None where they do not, or weights inside it have them."""
        return None

    def along_rows(self) -> tuple[Weight, ...]:
        """The weights inside it that have its rows."""
        return ()

    def in_proportion(self) -> bool:
        """Whether tensors hold its rows in proportion, so that what a block of rows becomes is written alone."""
        inner = self.along_rows()
        return all(each.in_proportion() for each in inner) if inner else self.row_storage() is not None

    def row_multiple(self) -> int:
        """A block of rows that is read alone begins at a multiple of it; 0 where all of it is read to decode some."""
        if inner := self.along_rows():
            return math.lcm(*(each.row_multiple() for each in inner))
        storage = self.row_storage()
        return 0 if storage is None else storage.multiple

    def read_rows(self, stored: Mapping[str, StoredTensor], rows: slice) -> Weight:
        """Some rows of the weight that this one is, or the outline of, from as much of its tensors as tells them.

        Raises:
            ValueError: its rows are not stored apart.
        """
        storage, total = self.row_storage(), self.shape[0]
        if storage is None:
            raise ValueError("its rows are not stored apart")
        parts = {suffix: share(stored[suffix].length, rows, total) for suffix in storage.along & stored.keys()}
        tensors = {suffix: tensor.read(parts.get(suffix)) for suffix, tensor in stored.items()}
        return self.restore(tensors, storage.meta(rows.stop - rows.start))

    def read(self, stored: Mapping[str, StoredTensor]) -> Weight:
        """All of the weight that this one is the outline of."""
        return self.restore({suffix: tensor.read(None) for suffix, tensor in stored.items()}, self.meta())

    @classmethod
    @abstractmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """Rebuild from what `tensors()` and `meta()` gave; from tensors without data, an outline."""

    def specs(self) -> dict[str, TensorSpec]:
        """Dtypes and shapes of `tensors()`."""
        return {suffix: TensorSpec.of(tensor) for suffix, tensor in self.tensors().items()}

    def numbers(self) -> int:
        """How many numbers are stored in place of the matrix: its codes, kept values and the numbers of its factors.

        Not counted is what says how to read them: scales, zero points, tables, column factors and masks.
        """
        return self.shape[0] * self.shape[1]

    def symbols(self) -> dict[str, Symbols]:
        """Those of `tensors()` that hold codes, indices or a mask, by suffix; none of a form made of others."""
        return {}

    @classmethod
    def of_part(cls, name: str, tensors: Mapping[str, Nested]) -> dict[str, Nested]:
        """Of the tensors of a weight those of what a field of it holds, under the suffixes that they have there."""
        if prefix := cls.prefixes[name]:
            return unnest(prefix, tensors)
        others = set(cls.prefixes.values())
        return {suffix: tensor for suffix, tensor in tensors.items() if suffix.partition("_")[0] not in others - {""}}

    def scale_suffixes(self) -> frozenset[str]:
        """Suffixes of the tensors, of its own and of the weights inside it, that say how codes are read."""
        read = {id(tensor) for each in within(self) for s, tensor in each.tensors().items() if s in each.scales}
        return frozenset(suffix for suffix, tensor in self.tensors().items() if id(tensor) in read)

    def describe(self) -> str:
        """The form's settings in a few words: "4-bit, groups of 64"; empty where there are none."""
        return ""

    def cut(self, axis: int, index: Tensor) -> Weight | None:
        """Some rows (axis 0) or columns (axis 1), bit for bit; of an outline, an outline.

        Returns:
            The same form, or None where it cannot hold them.
        """
        return None

    def parts(self) -> dict[str, Weight]:
        """What later steps compress as layers, the last one to be applied first.

        Both factors of a product, `out` on the left and `in` on the right; the kernels of several convolutions; or, as
        `out`, what is not zero.
        """
        return {}

    def part_nbytes(self, part: str) -> int:
        """Bytes that a part takes on disk; what belongs to none of them counts with the outer one."""
        sizes = {name: outline_nbytes(weight) for name, weight in self.parts().items()}
        return sizes[part] + (outline_nbytes(self) - sum(sizes.values()) if part == "out" else 0)

    def before(self, part: str) -> Tensor | None:
        """The matrix that an input is multiplied by before it reaches a part; None where that is given it as it is."""
        return self.parts()["in"].dense() if part == "out" else None

    def behind(self, part: str) -> Tensor | None:
        """The matrix that multiplies what a part gives; None where that is the layer's output."""
        return None if part == "out" else self.parts()["out"].dense()

    def with_parts(self, parts: Mapping[str, Weight]) -> Self:
        """The same weight with some of its parts replaced."""
        raise TypeError(f"{self.form} has no parts")

    def borrowed(self, part: str) -> dict[str, str]:
        """Suffixes of the tensors of a part -> those that they have where another parameter stores it.

        Args:
            part: a key of `parts()`; '' of a form that is another parameter's weight.
        """
        return {suffix: suffix for suffix in self.tensors() if suffix == part or suffix.startswith(f"{part}_")}

    def borrowing(self, part: str, owner: Weight) -> Self:
        """The same weight with a part of another one, which stores it."""
        return self.with_parts({part: owner.parts()[part]})


def inside(weight: Weight) -> dict[str, Weight]:
    """The weights that a stored form is made of, by the names of its fields."""
    return {name: value for name, value in vars(weight).items() if isinstance(value, Weight)}


def within(weight: Weight) -> Iterator[Weight]:
    """A weight, and all weights inside it."""
    yield weight
    for part in inside(weight).values():
        yield from within(part)


@cache
def forms() -> Mapping[str, type[Weight]]:
    """All stored forms by name. A form's file that does not import raises: nothing is skipped silently."""
    package = importlib.import_module("aicompress.weights.stored")
    known: dict[str, type[Weight]] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")):
        for value in vars(importlib.import_module(name)).values():
            if not isinstance(value, type) or not issubclass(value, Weight) or "form" not in vars(value):
                continue
            if known.setdefault(value.form, value) is not value:
                raise TypeError(f"two stored forms are named {value.form!r}")
    return known


def form_of(name: str) -> type[Weight]:
    """The class of a stored form.

    Raises:
        KeyError: no such form; the checkpoint was written by a newer version.
    """
    return forms()[name]


def restore(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Weight:
    """Rebuild a weight of any form."""
    return form_of(meta["form"]).restore(tensors, meta)


def require_real(**tensors: Tensor | None) -> None:
    """Refuse stored tensors that hold no real numbers.

    Raises:
        ValueError: naming one of another dtype.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name}: {tensor.dtype} holds no real numbers")


def require_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Refuse a stored tensor of another dtype than these.

    Raises:
        ValueError: it has another one.
    """
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, where {' or '.join(map(str, dtypes))} is stored")


def outline_nbytes(weight: Weight) -> int:
    """Exact bytes of the tensors that a weight, or its outline, takes on disk."""
    return sum(spec.nbytes for spec in weight.specs().values())


def nest(prefix: str, tensors: Mapping[str, Nested]) -> dict[str, Nested]:
    """Suffixes of a part inside a larger form: '' -> prefix, 'scale' -> prefix_scale; an empty prefix keeps them."""
    if not prefix:
        return dict(tensors)
    return {f"{prefix}_{suffix}" if suffix else prefix: tensor for suffix, tensor in tensors.items()}


def unnest(prefix: str, tensors: Mapping[str, Nested]) -> dict[str, Nested]:
    """Undo `nest` for a non-empty prefix."""
    return {key[len(prefix) + 1 :]: t for key, t in tensors.items() if key == prefix or key.startswith(prefix + "_")}
