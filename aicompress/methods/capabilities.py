"""What a layer-wise method can do beside compressing one layer: a capability is a value that it has or lacks.

A driver asks for a capability (`method.batched is not None`) and never for a name. Each is generic over the class of
the method's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.measure import relative
from aicompress.methods.head_products import HeadProduct
from aicompress.methods.method import MethodConfig
from aicompress.weights import Weight

C = TypeVar("C", bound=MethodConfig)


@dataclass(frozen=True)
class Candidate(Generic[C]):
    """A selected layer with the parameters that its rules gave it, for decisions that look at many layers.

    Attributes:
        info: the layer.
        config: its parameters.
        read: reads the layer; call it late and drop the result.
        input_name: names the input that the layer shares with others; None: it has one of its own.
        blocks: functions that read its blocks of rows, first rows first; None where it is read as a whole only.
    """

    info: LayerInfo
    config: C
    read: Callable[[], Layer]
    input_name: Callable[[], str] | None = None
    blocks: Sequence[Callable[[], Layer]] | None = None

    @property
    def parts(self) -> Sequence[Callable[[], Layer]]:
        """Functions that read all of the layer, in blocks of rows where it has them."""
        return [self.read] if self.blocks is None else self.blocks


@dataclass(frozen=True)
class Reads(Generic[C]):
    """The parameters decide which of the method's statistics are read.

    Attributes:
        statistics: config -> those of the method's `needs` that it reads; None: all of them.
        shift: config -> how far the target moves to make up for compressed layers before it; above 0 the method also
            reads `cross`, the original model's inputs against the compressed one's.
    """

    statistics: Callable[[C], frozenset[str]] | None = None
    shift: Callable[[C], float] = lambda config: 0.0


@dataclass(frozen=True)
class Batched(Generic[C]):
    """Layers that have the same inputs are compressed together, for less work than one by one.

    Attributes:
        compress: (layers, config) -> what `apply` gives for each of them.
    """

    compress: Callable[[Sequence[Layer], C], list[Weight]]


@dataclass(frozen=True)
class Prepares(Generic[C]):
    """What the method makes of a layer's inputs alone is made once for layers with these inputs that come in turn.

    Attributes:
        onto: (a layer, config) -> a function that gives what `apply` gives for any layer with the inputs of that one.
    """

    onto: Callable[[Layer, C], Callable[[Layer], Weight]]


@dataclass(frozen=True)
class TwoSided(Generic[C]):
    """A layer whose errors E count by both sides, tr(P E H Eᵀ), is compressed as a whole.

    Attributes:
        compress: (layer, P as (out, out), config) -> the weight; None where that cannot be, or rows share something.
    """

    compress: Callable[[Layer, Tensor, C], Weight | None]


@dataclass(frozen=True)
class Couples(Generic[C]):
    """Layers of which only products of heads count are compressed two by two; others stay as they are.

    Attributes:
        stays: (product, config) -> why its members stay as they are, in a few words; empty where they do not.
        outline: (product, one of its members, config) -> that one's stored weight without data.
        compress: (product, its members, their biases where they have one, config) -> the stored weights.
    """

    stays: Callable[[HeadProduct, C], str]
    outline: Callable[[HeadProduct, LayerInfo, C], Weight]
    compress: Callable[[HeadProduct, Sequence[Layer], Sequence[Tensor | None], C], list[Weight]]


@dataclass(frozen=True)
class Measured:
    """A compressed weight with the terms of its relative error.

    Attributes:
        weight: Ŵ.
        error: ‖W − Ŵ‖².
        norm: ‖W‖².
    """

    weight: Weight
    error: float
    norm: float


@dataclass(frozen=True)
class Rounded:
    """What a layer would lose if it were rounded to integer codes of no more bytes than it takes compressed.

    Errors are squared ones, as the method weighs them, each with that of zero: those of blocks of rows add up.

    Attributes:
        bits: of a code.
        codes: of these codes.
        compressed: of the compressed weight.
    """

    bits: int
    codes: tuple[float, float]
    compressed: tuple[float, float]

    @property
    def error(self) -> float:
        """Relative error of the codes."""
        return relative(*self.codes)

    @property
    def instead_of(self) -> float:
        """Relative error of the compressed weight."""
        return relative(*self.compressed)

    @classmethod
    def of_blocks(cls, blocks: Sequence[Rounded | None]) -> Rounded | None:
        """Of a layer, by its blocks of rows; None where nothing can be said of one."""
        known = [block for block in blocks if block is not None]
        if not known or len(known) < len(blocks):
            return None
        codes, compressed = (
            (math.fsum(error for error, _ in sums), math.fsum(norm for _, norm in sums))
            for sums in ([block.codes for block in known], [block.compressed for block in known])
        )
        return cls(known[0].bits, codes, compressed)


@dataclass(frozen=True)
class RowWise(Generic[C]):
    """Rows are compressed apart from each other, without random numbers: a large layer is done in blocks of rows.

    Attributes:
        independent: config -> whether its rows are, or become so by `divided`.
        measured: (rows of a weight as they are stored, layer info, config) -> what `apply` gives for them and its
            error, in one fast pass; None where that takes `apply`.
        divided: (layer info, functions that read its blocks of rows, config) -> a config for each block, where what a
            row becomes depends on the others; None: the layer's own for all of them.
        divides: config -> whether `divided` is needed.
        together: config -> the number of rows that a block holds a multiple of, where rows share bytes on disk.
        exact: blocks give the numbers that the whole gives, to the last bit; else others that are as close.
    """

    independent: Callable[[C], bool]
    measured: Callable[[Tensor, LayerInfo, C], Measured | None] | None = None
    divided: Callable[[LayerInfo, Sequence[Callable[[], Layer]], C], list[C]] | None = None
    divides: Callable[[C], bool] = lambda config: True
    together: Callable[[C], int] = lambda config: 1
    exact: bool = True

    def parted(self, config: C) -> bool:
        """Whether blocks of rows have configs of their own."""
        return self.divided is not None and self.divides(config)


@dataclass(frozen=True)
class ScalingFactors:
    """Factors of one scaling group: of one input and the layers that read it.

    Attributes:
        factors: s, (in,) above zero: the input is divided by them, the layers' columns are multiplied.
        note: how they were chosen, for the report.
    """

    factors: Tensor
    note: str


@dataclass(frozen=True)
class Rescales(Generic[C]):
    """The model is rescaled, one scaling group after another, before its layers are compressed.

    `apply` sees the rescaled weight, and statistics of the rescaled input.

    Attributes:
        factors: (the layers that read one input, a function that makes those factors equal which must be) -> the
            factors, or None to leave this input as it is.
    """

    factors: Callable[[Sequence[Candidate[C]], Callable[[Tensor], Tensor]], ScalingFactors | None]


class Rotation(Protocol):
    """An orthogonal matrix R."""

    def along(self, tensor: Tensor, axis: int) -> Tensor:
        """The tensor with R applied along an axis."""


@dataclass(frozen=True)
class Rotates(Generic[C]):
    """The model's residual stream is rotated before its layers are compressed; `apply` sees the rotated model.

    Attributes:
        rotation: (width of the residual stream, whether the vector of ones must stay, seed) -> the rotation.
        unties: config -> whether an output head that shares the embedding's matrix may get one of its own.
    """

    rotation: Callable[[int, bool, int], Rotation]
    unties: Callable[[C], bool]
