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
    """Layers with the same inputs come one after the other, and the work on the inputs is done once for all of them.

    Attributes:
        onto: (a layer, config) -> a function that gives what `apply` gives, for any layer with the inputs of this one.
    """

    onto: Callable[[Layer, C], Callable[[Layer], Weight]]


@dataclass(frozen=True)
class TwoSided(Generic[C]):
    """The method can minimize an error E that is weighted on both sides, tr(P E H Eᵀ), such as that of an outer factor.

    Attributes:
        compress: (layer, P of shape (out, out), config) -> the weight; None where the config does not allow it, such as
            where rows share a scale.
    """

    compress: Callable[[Layer, Tensor, C], Weight | None]


@dataclass(frozen=True)
class Couples(Generic[C]):
    """Pairs of layers whose heads are multiplied with each other are compressed together; other layers stay.

    Attributes:
        stays: (product, config) -> why its two layers stay as they are, in a few words; empty where they do not.
        outline: (product, one of its layers, config) -> that layer's stored weight without data.
        compress: (product, its two layers, their biases or None, config) -> the stored weights.
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
    """The error of a layer rounded to integer codes, in no more bytes than its compressed weight takes.

    An error is a pair: the squared error, weighted as the method weighs it, and the same of an all-zero weight. Pairs
    of blocks of rows add up.

    Attributes:
        bits: of a code.
        codes: the error of these codes.
        compressed: the error of the compressed weight.
    """

    bits: int
    codes: tuple[float, float]
    compressed: tuple[float, float]

    @property
    def error(self) -> float | None:
        """Relative error of the codes; None where the layer is all zeros and they are not."""
        return relative(*self.codes)

    @property
    def instead_of(self) -> float | None:
        """Relative error of the compressed weight; None as for the codes."""
        return relative(*self.compressed)

    @classmethod
    def of_blocks(cls, blocks: Sequence[Rounded | None]) -> Rounded | None:
        """The error of a layer from those of its blocks of rows; None where that of a block is not known."""
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
    """Rows are compressed independently, so that a large layer is done in blocks of rows.

    Random numbers are drawn for all of them at once, in `divided`, from the first block's seed.

    Attributes:
        independent: config -> whether rows are independent, or become so with the configs of `divided`.
        measured: (rows of a weight as they are stored, layer info, config) -> what `apply` gives for them and its
            error, in one fast pass; None where only `apply` can do it.
        divided: (layer info, functions that read its blocks of rows, config) -> a config for each block, where the
            result of a row depends on the other rows; None: every block takes the layer's config.
        divides: config -> whether `divided` is needed.
        multiple: config -> a block holds a multiple of this many rows, because they share bytes on disk.
        exact: blocks give the same numbers as the whole layer, to the last bit; otherwise numbers that are as close.
    """

    independent: Callable[[C], bool]
    measured: Callable[[Tensor, LayerInfo, C], Measured | None] | None = None
    divided: Callable[[LayerInfo, Sequence[Callable[[], Layer]], C], list[C]] | None = None
    divides: Callable[[C], bool] = lambda config: True
    multiple: Callable[[C], int] = lambda config: 1
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
        factors: (the layers that read one input, a function that makes equal those factors which have to be) -> the
            factors; None leaves this input as it is.
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
        rotation: (width of the residual stream, whether R must keep the vector of ones, seed) -> the rotation R.
        unties: config -> whether an output head that shares the embedding's matrix may get one of its own.
    """

    rotation: Callable[[int, bool, int], Rotation]
    unties: Callable[[C], bool]
