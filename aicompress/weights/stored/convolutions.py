"""A convolution as several smaller ones, one after the other: each kernel is a matrix in a stored form of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.coding.rows import StoredTensor
from aicompress.weights.decoding import Kernels, Meta, composed, convolutions
from aicompress.weights.form import Weight, nest, restore
from aicompress.weights.stored.dense import Dense


@dataclass(frozen=True)
class Convolutions(Weight):
    """Two or three convolutions, no two of which are wider than one position along the same axis.

    The matrix that they stand for is the convolution's, (O, I*prod(k)). The primary tensor is the last kernel's matrix:
    it has two axes, where the dense kernel has three or more.

    Attributes:
        kernels: their kernel sizes, of the first one first.
        inner: the first one's matrix, (channels, I*prod(its kernel size)).
        out: the last one's, (O, channels*prod(its kernel size)).
        core: that of the one between them, or None.
    """

    form: ClassVar[str] = "convolutions"
    prefixes: ClassVar[Mapping[str, str]] = {"inner": "in", "core": "core", "out": ""}
    is_product: ClassVar[bool] = False
    kernels: tuple[tuple[int, ...], ...]
    inner: Weight
    out: Weight
    core: Weight | None = None

    @property
    def shape(self) -> tuple[int, int]:
        kernel = math.prod(math.prod(size) for size in self.kernels)
        return (self.out.shape[0], self.inner.shape[1] // math.prod(self.kernels[0]) * kernel)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels between the convolutions, of the first one first."""
        return (self.inner.shape[0], *(() if self.core is None else (self.core.shape[0],)))

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, part in self.parts().items():
            tensors |= nest("" if name == "out" else name, part.tensors())
        return tensors

    def meta(self) -> dict[str, Any]:
        parts = {name: part.meta() for name, part in self.parts().items()}
        return {"form": self.form, "kernels": [list(size) for size in self.kernels], **parts}

    def dense(self) -> Tensor:
        matrices = {name: part.dense() for name, part in self.parts().items()}
        if any(matrix.is_meta for matrix in matrices.values()):
            return torch.empty(self.shape, dtype=torch.float32, device="meta")
        return composed(convolution_kernels(self.meta(), matrices))

    def rows(self, start: int, stop: int) -> Tensor:
        return self.with_parts({"out": Dense(self.out.rows(start, stop))}).dense()

    def numbers(self) -> int:
        return sum(part.numbers() for part in self.parts().values())

    def describe(self) -> str:
        sizes = ", ".join("×".join(map(str, size)) for size in self.kernels)
        between = " and ".join(map(str, self.channels))
        words = [part.describe() for part in self.parts().values()]
        forms = f" ({' · '.join(each or 'dense' for each in words)})" if any(words) else ""
        return f"{sizes} by way of {between} channels{forms}"

    def parts(self) -> dict[str, Weight]:
        core = {} if self.core is None else {"core": self.core}
        return {"out": self.out, **core, "in": self.inner}

    def with_parts(self, parts: Mapping[str, Weight]) -> Convolutions:
        inner, out = parts.get("in", self.inner), parts.get("out", self.out)
        return Convolutions(self.kernels, inner, out, None if self.core is None else parts.get("core", self.core))

    def along_rows(self) -> tuple[Weight, ...]:
        return (self.out,)

    def read_rows(self, stored: Mapping[str, StoredTensor], rows: slice) -> Convolutions:
        inner, core, out = (self.of_part(name, stored) for name in self.prefixes)
        between = None if self.core is None else self.core.read(core)
        return Convolutions(self.kernels, self.inner.read(inner), self.out.read_rows(out, rows), between)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Convolutions:
        kernels = tuple(tuple(map(int, size)) for size in meta["kernels"])
        own = {name: cls.of_part(name, tensors) for name in cls.prefixes}
        core = restore(own["core"], meta["core"]) if "core" in meta else None
        weight = cls(kernels, restore(own["inner"], meta["in"]), restore(own["out"], meta["out"]), core)
        wider = [] if core is None else [core]
        if len(kernels) != 2 + len(wider):
            raise ValueError(f"{len(kernels)} kernel sizes of {2 + len(wider)} convolutions")
        for channels, part, size in zip(weight.channels, [*wider, weight.out], kernels[1:], strict=True):
            if part.shape[1] != channels * math.prod(size):
                raise ValueError(f"a kernel of {part.shape[1]} columns behind {channels} channels")
        return weight


@convolutions("convolutions")
def convolution_kernels(meta: Meta, matrices: Mapping[str, Tensor]) -> Kernels:
    """The kernels (out, in, *k), of the first convolution first."""
    names = [name for name in ("in", "core", "out") if name in matrices]
    return [
        matrices[name].reshape(len(matrices[name]), -1, *size)
        for name, size in zip(names, meta["kernels"], strict=True)
    ]
