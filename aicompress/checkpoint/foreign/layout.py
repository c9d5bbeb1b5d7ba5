"""The contract of a foreign layout: it recognizes weights by names, dtypes and shapes of tensors, and decodes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint.naming import is_transposed
from aicompress.layer import from_matrix
from aicompress.weights import Dense, TensorSpec, Weight
from aicompress.weights.coding.rows import row_slices

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class ForeignWeight:
    """A weight as another tool stores it.

    Attributes:
        dense: the parameter that it stands for.
        names: role -> name on disk of each of its tensors.
        words: how it is stored, in a few words: "fp8, blocks of 128 × 128"; empty where it is plain.
        decode: (read by role) -> the matrix (out, in) in one of our forms; or in the parameter's own shape flattened
            behind its first axis.
        outline: the same form without data where a step can write it again as it is; None where the weight is decoded.
        transposed: the parameter stores (in, out), the matrix is (out, in).
        extra: role -> name of tensors of other files, such as an adapter's, or of other parameters.
        along: role -> axis along which its tensor has the matrix's rows, in proportion; the others, and those of one
            entry, belong to all rows. None where some rows cannot be decoded alone.
        multiple: a block of rows begins at a multiple of it, as rows share bytes or numbers.
    """

    dense: TensorSpec
    names: Mapping[str, str]
    words: str
    decode: Callable[[Read], Weight]
    outline: Weight | None = None
    transposed: bool = False
    extra: Mapping[str, str] = field(default_factory=dict)
    along: Mapping[str, int] | None = None
    multiple: int = 1

    @property
    def rows(self) -> int:
        """How many rows the matrix has, or the parameter along its first axis."""
        return self.dense.shape[1 if self.transposed else 0] if self.dense.shape else 0

    def part(self, rows: slice) -> ForeignWeight:
        """Some rows, to be decoded from the parts of tensors that `cut` names."""
        count, shape = rows.stop - rows.start, self.dense.shape
        shape = (shape[0], count) if self.transposed else (count, *shape[1:])
        return replace(self, dense=TensorSpec(self.dense.dtype, shape))

    def weight(self, read: Read) -> Weight:
        """The weight in its form, from a function that reads tensors by their names on disk.

        Raises:
            ValueError: its tensors are not what the layout says.
        """
        return self.decode(lambda role: read(self.extra[role] if role in self.extra else self.names[role]))

    def tensor(self, read: Read) -> Tensor:
        """The dense parameter; errors as of `weight`."""
        weight = self.weight(read)
        matrix = weight.matrix if isinstance(weight, Dense) else weight.dense()
        return from_matrix(matrix, self.dense.shape, self.transposed).to(self.dense.dtype)


@dataclass(frozen=True)
class ForeignTensors:
    """What a layout looks at: headers and JSON, and the few small tensors that it has to read before it knows shapes.

    Attributes:
        specs: dtype and shape of every tensor on disk.
        read: reads one of them.
        settings: the quantization_config, or what a tool wrote in a file of its own.
        config: config.json.
        dtype: what weights decode to.
    """

    specs: Mapping[str, TensorSpec]
    read: Read
    settings: Mapping[str, Any]
    config: dict[str, Any] | None
    dtype: torch.dtype

    def dense(self, parameter: str, shape: tuple[int, int]) -> tuple[TensorSpec, bool]:
        """The parameter of a matrix (out, in), and whether it stores (in, out)."""
        transposed = is_transposed(parameter, self.config)
        return TensorSpec(self.dtype, shape[::-1] if transposed else shape), transposed

    def names(self, module: str, roles: Mapping[str, str]) -> dict[str, str]:
        """Names on disk of a module's tensors, role -> name, for the suffixes that are there."""
        full = {role: f"{module}.{suffix}" if module else suffix for role, suffix in roles.items()}
        return {role: name for role, name in full.items() if name in self.specs}


@dataclass(frozen=True)
class ForeignLayout:
    """A layout that another tool writes.

    Attributes:
        name: of the layout.
        methods: values of `quant_method` under which its weights come; without one it is told by its tensors.
        weights: recognizes the weights of a checkpoint, parameter -> weight.
    """

    name: str
    methods: tuple[str, ...]
    weights: Callable[[ForeignTensors], dict[str, ForeignWeight]]


def modules_with(specs: Mapping[str, TensorSpec], suffix: str) -> list[str]:
    """Modules that have a tensor of this name; "" for one at the root."""
    ends = [name for name in specs if name == suffix or name.endswith(f".{suffix}")]
    return [name[: -len(suffix) - 1] if name != suffix else "" for name in ends]


def weight_of(module: str) -> str:
    """The parameter `weight` of a module."""
    return f"{module}.weight" if module else "weight"


def require(holds: bool, why: str) -> None:
    """Refuse tensors that are not what their layout says.

    Raises:
        ValueError: it does not hold.
    """
    if not holds:
        raise ValueError(why)


def decoded(rows: int, columns: int, dtype: torch.dtype, step: int, decode: Callable[[int, int], Tensor]) -> Dense:
    """A matrix decoded a few rows at a time, so that no copy of all of it in float32 is needed.

    Args:
        rows, columns, dtype: of the matrix.
        step: rows that go together; several of these are done at once.
        decode: (first, last) -> those rows in float32.
    """
    matrix = torch.empty(rows, columns, dtype=dtype)
    for part in row_slices(rows, columns, PIECE, step):
        matrix[part] = decode(part.start, part.stop)
    return Dense(matrix)


PIECE = 1 << 20  # numbers decoded at a time
