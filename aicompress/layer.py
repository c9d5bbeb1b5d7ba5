"""What a method is given: one layer's weight as a matrix, and what is known of its inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from aicompress.statistics import GradientStats, InputStats

if TYPE_CHECKING:
    from aicompress.weights import Weight

Kind = Literal["linear", "experts", "conv", "embedding", "head"]
KINDS: tuple[Kind, ...] = ("linear", "experts", "conv", "embedding", "head")


@dataclass(frozen=True)
class MergedExperts:
    """The matrices of experts that one parameter holds, one below the other, where each is compressed by itself.

    Attributes:
        count: how many there are.
        transposed: the parameter holds each of them as (in, out).
    """

    count: int
    transposed: bool = False

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The matrices (out, in) out of those of the parameter, or of something of its shape."""
        parts = rows.reshape(-1, rows.shape[-1]).tensor_split(self.count)
        return tuple(part.t() for part in parts) if self.transposed else parts


@dataclass(frozen=True)
class LayerInfo:
    """A layer as the file headers show it, before any byte of it is read.

    A weight is always seen as a matrix (out, in): a convolution (O, I, *k) as (O, I*prod(k)), a GPT-2 Conv1D
    (in, out) transposed, an embedding as (tokens, width).

    Attributes:
        name: what patterns match, e.g. `model.layers.0.mlp.up_proj`; a part of a stored weight ends in the form and
            its part, `.low_rank.out` or `.low_rank.in`.
        tensor: the parameter's name in the checkpoint, e.g. `model.layers.0.mlp.up_proj.weight`.
        kind: linear, conv, embedding, or head (the output projection of a model).
        shape: matrix shape (out, in).
        tensor_shape: the parameter's own shape.
        dtype: the parameter's dtype (for a compressed layer: the dtype it decodes to).
        transposed: the parameter stores (in, out).
        part: which part of a stored weight this is: `out` or `in`, or `core` between them; empty for a whole one.
        stored: the form it has in the input: dense, low_rank, int_grouped, ...
        nbytes: bytes it takes in the input file.
        outline: the weight in that form without data; None for a dense one.
        owner: the parameter that stores it, where that is another one: it changes with that.
        experts: the matrices that it holds, where each is compressed by itself; None: it is compressed as one.
    """

    name: str
    tensor: str
    kind: Kind
    shape: tuple[int, int]
    tensor_shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    part: str = ""
    stored: str = "dense"
    nbytes: int = 0
    outline: Weight | None = None
    owner: str = ""
    experts: MergedExperts | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All names that a pattern may match: a factor also answers to its layer's name."""
        return (self.name, self.name.rsplit(".", 2)[0]) if self.part else (self.name,)

    def matrix(self, tensor: Tensor) -> Tensor:
        """The parameter, or some of its first axis, as the matrix (out, in) that methods work on.

        Experts in one tensor (experts, out, in) are one matrix: their rows one after the other.
        """
        return tensor.t() if self.transposed else tensor.reshape(-1, self.shape[1])

    def of_expert(self, number: int, outline: Weight | None = None) -> LayerInfo:
        """The layer that one of its experts is.

        Args:
            number: of the expert.
            outline: the form that it has in the input, without data; None for a dense one.
        """
        assert self.experts is not None
        rows, columns = self.shape[0] // self.experts.count, self.shape[1]
        shape = (columns, rows) if self.experts.transposed else (rows, columns)
        return replace(
            self,
            name=f"{self.name}.{number}",
            shape=shape,
            tensor_shape=shape,
            stored="dense" if outline is None else outline.form,
            nbytes=self.nbytes // self.experts.count,
            outline=outline,
            experts=None,
        )

    @property
    def index(self) -> int | None:
        """Depth: the first number in the name (`model.layers.3.mlp.up_proj` -> 3), or None."""
        return next((int(piece) for piece in self.name.split(".") if piece.isdigit()), None)


@dataclass(frozen=True)
class Layer:
    """One layer, ready for a method.

    Attributes:
        info: names and shapes.
        weight: float32 matrix (out, in). Methods must not modify it.
        stored: the form the weight had in the input, so that a mask or a re-encoding can keep it.
        inputs: calibration statistics, or None for data-free methods.
        seed: seeds the method's own torch.Generator.
        gradients: moments of the loss's gradient in the weight, or None for methods that do not read them.
        movement: -Σ w g over the steps of a training run, (out, in), or None for methods that do not read it.
    """

    info: LayerInfo
    weight: Tensor
    stored: Weight | None = None
    inputs: InputStats | None = None
    seed: int = 0
    gradients: GradientStats | None = None
    movement: Tensor | None = None


def as_matrix(tensor: Tensor, transposed: bool = False) -> Tensor:
    """View a parameter as the matrix (out, in) that methods work on."""
    if transposed:
        return tensor.t()
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim != 2 else tensor


def from_matrix(matrix: Tensor, shape: tuple[int, ...], transposed: bool = False) -> Tensor:
    """Undo `as_matrix`: the parameter of the given shape."""
    return matrix.t().contiguous() if transposed else matrix.reshape(shape)
