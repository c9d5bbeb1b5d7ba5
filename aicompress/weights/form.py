"""The contract of every stored form, and the lookup from its name to its class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

_FORMS: dict[str, type[Weight]] = {}


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a stored tensor: all that a file header says of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        return cls(tensor.dtype, tuple(tensor.shape))


class Weight(ABC):
    """A matrix (out, in) in one stored form.

    Subclasses set `form` and are found by that name when a checkpoint is read. The tensor under the empty suffix is the
    primary one: it is stored under the parameter's own name, with a shape that the dense parameter can never have, so
    that a reader which does not know the form raises a size mismatch instead of loading noise.
    """

    form: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.form in _FORMS:
            raise TypeError(f"two stored forms are named {cls.form!r}")
        _FORMS[cls.form] = cls

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
        """The float32 matrix (out, in) that this form stands for."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of `dense()`, (stop - start, in) float32, the caller's to change; a form that can decodes only those."""
        return self.dense()[start:stop]

    @classmethod
    @abstractmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Weight:
        """Rebuild from what `tensors()` and `meta()` gave."""

    def specs(self) -> dict[str, TensorSpec]:
        """Dtypes and shapes of `tensors()`."""
        return {suffix: TensorSpec.of(tensor) for suffix, tensor in self.tensors().items()}

    def parameters(self) -> int:
        """How many numbers the form stores: codes, values and factors; scales are not counted."""
        return self.shape[0] * self.shape[1]


def form_of(name: str) -> type[Weight]:
    """The class of a stored form.

    Raises:
        KeyError: no such form; the checkpoint was written by a newer version.
    """
    return _FORMS[name]


def restore(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Weight:
    """Rebuild a weight of any form."""
    return form_of(meta["form"]).restore(tensors, meta)


def outline_nbytes(weight: Weight) -> int:
    """Exact bytes of the tensors that a weight, or its outline, takes on disk."""
    return sum(spec.nbytes for spec in weight.specs().values())


def nest(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Suffixes of a part inside a larger form: '' -> prefix, 'scale' -> prefix_scale; an empty prefix keeps them."""
    if not prefix:
        return dict(tensors)
    return {f"{prefix}_{suffix}" if suffix else prefix: tensor for suffix, tensor in tensors.items()}


def unnest(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `nest` for a non-empty prefix."""
    return {key[len(prefix) + 1 :]: t for key, t in tensors.items() if key == prefix or key.startswith(prefix + "_")}
