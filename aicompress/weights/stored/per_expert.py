"""The matrices of several experts that one parameter holds, each in the same stored form with the same settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.coding.rows import RowStorage
from aicompress.weights.decoding import Meta, Tensors, decode, decoder
from aicompress.weights.form import Symbols, Weight, restore
from aicompress.weights.stored.dense import Dense


@dataclass(frozen=True)
class PerExpert(Weight):
    """A weight for each expert. A stored tensor is that of the first expert, followed by those of the others.

    Attributes:
        weights: of the experts, (out, in) each, of one form, with one description and tensors of one shape.
        transposed: the parameter holds each of them as (in, out).
    """

    form: ClassVar[str] = "per_expert"
    is_product: ClassVar[bool] = False  # each expert's weight may be one
    weights: tuple[Weight, ...]
    transposed: bool = False

    def __post_init__(self) -> None:
        first, *others = self.weights
        if any(other.meta() != first.meta() or other.specs() != first.specs() for other in others):
            raise ValueError("experts that are stored in different ways")

    @classmethod
    def joined(cls, weights: Sequence[Weight], transposed: bool) -> Weight:
        """The weight of a parameter; a plain matrix where those of all experts are.

        Raises:
            ValueError: they are stored in different ways.
        """
        if not all(isinstance(weight, Dense) for weight in weights):
            return cls(tuple(weights), transposed)
        matrices = [weight.tensors()[""] for weight in weights]
        return Dense(torch.cat([matrix.t() for matrix in matrices] if transposed else matrices))

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weights[0].shape[::-1] if self.transposed else self.weights[0].shape
        return (len(self.weights) * rows, columns)

    def tensors(self) -> dict[str, Tensor]:
        own = [weight.tensors() for weight in self.weights]
        return {suffix: torch.cat([tensors[suffix] for tensors in own]) for suffix in own[0]}

    def symbols(self) -> dict[str, Symbols]:
        whole: dict[str, Symbols] = {}
        for suffix, symbols in self.weights[0].symbols().items():
            if symbols.kind == "bytes":
                whole[suffix] = replace(symbols, columns=len(self.weights) * symbols.columns)
            elif symbols.kind != "mask" or symbols.rows * symbols.columns % 8 == 0:  # each mask ends with its byte
                whole[suffix] = replace(symbols, rows=len(self.weights) * symbols.rows)
        return whole

    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {"form": self.form, "count": len(self.weights), "each": self.weights[0].meta()}
        return {**meta, "transposed": True} if self.transposed else meta

    def dense(self) -> Tensor:
        matrices = [weight.dense() for weight in self.weights]
        return torch.cat([matrix.t() for matrix in matrices] if self.transposed else matrices)

    def rows(self, start: int, stop: int) -> Tensor:
        if self.transposed:
            return self.dense()[start:stop]
        each = self.weights[0].shape[0]
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        parts = [
            weight.rows(max(0, start - first), min(each, stop - first))
            for first, weight in zip(range(0, self.shape[0], each), self.weights, strict=True)
            if start < first + each and first < stop
        ]
        return torch.cat(parts) if parts else self.dense()[start:stop]

    def numbers(self) -> int:
        return sum(weight.numbers() for weight in self.weights)

    def scale_suffixes(self) -> frozenset[str]:
        return self.weights[0].scale_suffixes()

    def describe(self) -> str:
        return ", ".join(filter(None, (f"{len(self.weights)} experts", self.weights[0].describe())))

    def chosen(self, experts: Tensor) -> PerExpert:
        """The weight of some experts, by their numbers; of an outline, an outline."""
        numbers = range(len(experts)) if experts.is_meta else experts.tolist()
        return replace(self, weights=tuple(self.weights[number] for number in numbers))

    def parts(self) -> dict[str, Weight]:
        """The parts of all experts' weights, those of one kind one below the other."""
        own = [weight.parts() for weight in self.weights]
        return {part: PerExpert.joined([parts[part] for parts in own], False) for part in own[0]}

    def with_parts(self, parts: Mapping[str, Weight]) -> PerExpert:
        own = {part: divided(weight, len(self.weights)) for part, weight in parts.items()}
        weights = (old.with_parts({p: new[n] for p, new in own.items()}) for n, old in enumerate(self.weights))
        return PerExpert(tuple(weights), self.transposed)

    def before(self, part: str) -> Tensor | None:
        return None

    def behind(self, part: str) -> Tensor | None:
        return None

    def row_storage(self) -> RowStorage | None:
        """Experts apart from each other, where there are several."""
        each, meta = self.shape[0] // len(self.weights), self.meta()
        along = frozenset(self.weights[0].specs())
        return RowStorage(along, lambda rows: {**meta, "count": rows // each}, each) if len(self.weights) > 1 else None

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> PerExpert:
        count = int(meta["count"])
        for suffix, tensor in tensors.items():
            if not 1 <= count <= len(tensors[""]) or len(tensor) % count:
                raise ValueError(f"{suffix or 'codes'} of {len(tensor)} rows for {count} experts")
        split = {suffix: tensor.tensor_split(count) for suffix, tensor in tensors.items()}
        own = [{suffix: parts[n] for suffix, parts in split.items()} for n in range(count)]
        return cls(tuple(restore(each, meta["each"]) for each in own), bool(meta.get("transposed")))


def divided(weight: Weight, count: int) -> Sequence[Weight]:
    """The weights of single experts, of a part of all of them.

    Raises:
        TypeError: they were made as one.
    """
    if isinstance(weight, PerExpert):
        return weight.weights
    if isinstance(weight, Dense):
        return [Dense(matrix) for matrix in weight.matrix.tensor_split(count)]
    raise TypeError(f"{weight.form} of {count} experts is not divided")


@decoder("per_expert")
def decode_per_expert(meta: Meta, tensors: Tensors) -> Tensor:
    """The matrices of all experts as the parameter holds them, one below the other."""
    count = int(meta["count"])
    split = {suffix: tensor.tensor_split(count) for suffix, tensor in tensors.items()}
    matrices = [decode(meta["each"], {suffix: parts[n] for suffix, parts in split.items()}) for n in range(count)]
    return torch.cat([matrix.t() for matrix in matrices] if meta.get("transposed") else matrices)
